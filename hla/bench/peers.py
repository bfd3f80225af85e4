"""What timings are compared with: the peers a user has instead, and the machine's own floor.

The floor of a row is the operations of its program over the matrix rate that the machine reaches in
the same run (`matrix_product`). A pass with key width K and value width U, in chunks of W = 64
tokens, costs a token and head two small products (q k' and A v: W K and W U multiply-adds) and two
large ones (q S and k' v: K U each); a program costs the sum of its passes, so hla2 on 8 heads of
4096 tokens, D = V = 64, costs 8 * 64 * 64 * 2 * 8 * 4096 = 2.15 GFLOP. The adjoint of a pass is
three passes: forward + backward counts four times the operations, though one sweep can share a few
products. On an accelerator the floor is the larger of that and the compulsory bytes over the
measured copy bandwidth. One step has no floor.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import hla

from ..core.programs import CAUSAL
from ..libraries import library_of
from .libraries import Array, Arrays, Call, Host, Library, load
from .workloads import (
    COMPILED,
    DECAY,
    HOST,
    Case,
    Work,
    against_truth,
    awaited,
    compiler,
    inputs,
    sample,
)

CHUNK = 64
LIMIT = 0.02  # a peer promises no accuracy: its error is shown, and refused if plainly wrong
CPU, GPU = False, True  # on an accelerator?
PARTS = slice(None, -1), slice(-1, None)  # all tokens but the last, and that


class Peer(NamedTuple):
    """What a user has instead: its library, what it can do, where, and under which gates."""

    library: str
    workloads: tuple[str, ...]
    places: tuple[bool, ...]
    prepare: Callable[[str, Case, bool], Work]
    gates: tuple[str, ...] = ("none",)

    def can(self, workload: str, accelerator: bool) -> bool:
        """Whether it has this workload there."""
        return workload in self.workloads and accelerator in self.places


def peer(name: str, workload: str, case: Case, accelerator: bool = False) -> Work:
    """Prepare the call of a peer.

    Parameters
    ----------
    name : str
        One of `PEERS`.
    workload : str
        As for `hla.bench.workloads.work`.
    case : Case
        Operator and size.
    accelerator : bool
        Where it runs.

    Raises
    ------
    NotImplementedError
        The library or the hardware is missing, or the peer has no such workload.
    """
    chosen = PEERS[name]
    if not chosen.can(workload, accelerator):
        where = "an accelerator" if accelerator else "the host"
        raise NotImplementedError(f"{name} has no workload {workload!r} on {where}")
    if case.gate not in chosen.gates:
        raise NotImplementedError(f"{name} is not set up for the gate {case.gate!r}")
    if chosen.library == "numpy" and case.dtype == "bfloat16":
        raise NotImplementedError(f"{name} has no bfloat16")
    return chosen.prepare(workload, case, accelerator)


def _compiled(
    workload: str,
    lib: Library,
    function: Callable[..., Array],
    arrays: Sequence[Array],
    error: Callable[[Arrays], float],
) -> Work:
    """Return a function of q, k and v, or with its gradients of do too, as the library compiles."""
    q, k, v, do = arrays
    if workload == "forward":
        forward = lib.compile(lambda q, k, v: (function(q, k, v),))
        return Work(Call(lambda: forward(q, k, v), lib), error, LIMIT)
    assert lib.vjp is not None
    back = lib.compile(lib.vjp(function))
    return Work(Call(lambda: back(q, k, v, do), lib), error, LIMIT)


def _attention(workload: str, case: Case, accelerator: bool) -> Work:
    """Torch's causal softmax attention: another function, the one that HLA would replace.

    A step is one query over T cached keys and values.
    """
    lib = load("torch", accelerator)
    import torch

    q, k, v, do = (lib.array(x, case.dtype) for x in inputs(case)[:4])
    softmax = torch.nn.functional.scaled_dot_product_attention
    causal = functools.partial(softmax, is_causal=True)

    error = functools.partial(_softmax_error, case)
    if workload == "step":
        token = q[..., -1:, :]
        return Work(Call(lambda: (softmax(token, k, v),), lib), error, LIMIT)
    return _compiled(workload, lib, causal, (q, k, v, do), error)


def _jax_attention(workload: str, case: Case, accelerator: bool) -> Work:
    """JAX's causal softmax attention by cuDNN, in its own layout (B, T, H, D)."""
    lib = load("jax", accelerator)
    if case.dtype != "bfloat16":
        raise NotImplementedError("cuDNN's attention takes bfloat16 and float16")
    import jax

    native = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in inputs(case)[:4])
    q, k, v, do = (lib.array(x, case.dtype) for x in native)
    causal = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, scale=case.scale, implementation="cudnn"
    )

    def error(got: Arrays) -> float:
        return _softmax_error(case, (got[0].swapaxes(1, 2),))

    return _compiled(workload, lib, causal, (q, k, v, do), error)


def _softmax_error(case: Case, got: Arrays) -> float:
    """Error of the last 64 tokens of softmax attention, of one token where there is one."""
    want = _softmax([sample(x, case) for x in inputs(case)[:3]], case.scale)
    last = sample(got[0][..., -want.shape[-2] :, :], case)
    want = want[..., -last.shape[-2] :, :]
    return float(np.sqrt(np.square(last - want).sum() / np.square(want).sum()))


def _softmax(qkv: list[Host], scale: float) -> Host:
    """Causal softmax attention of the last 64 tokens."""
    q, k, v = qkv
    q = q[..., -CHUNK:, :]
    T, L = k.shape[-2], q.shape[-2]
    scores = scale * (q @ k.mT) + np.where(np.tri(L, T, T - L), 0, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True) @ v)


def _fla(kernel: str, workload: str, case: Case, accelerator: bool) -> Work:
    """flash-linear-attention: a first-order kernel once a pass, in its own layout (B, T, H, D).

    For the host's time once, whatever the operator.
    """
    lib = awaited(load("torch", accelerator), workload)
    if workload in HOST:
        workload, case = workload.removeprefix("host "), case._replace(operator="linear")
    if importlib.util.find_spec("fla") is None:
        raise NotImplementedError("fla-core is not installed")
    run_pass = getattr(importlib.import_module("fla.ops.simple_gla"), kernel)
    native = (lib.array(x, case.dtype).swapaxes(1, 2).contiguous() for x in inputs(case)[:4])
    q, k, v, do = native
    steps = CAUSAL[case.operator]
    log_decays: list[Array] = [None for _ in steps]
    if case.gate == "decay":
        heads = np.full(case.heads, math.log(DECAY), np.float32)
        log_decays = [lib.array(s.power * heads, "float32") for s in steps]

    def chain(q: Array, k: Array, v: Array, states: Any = None, **options: Any) -> Arrays:
        at, ends = {"q": q, "k": k, "v": v}, []
        for i, (s, log_decay) in enumerate(zip(steps, log_decays, strict=True)):
            given = options if states is None else {**options, "initial_state": states[i]}
            at[s.out], end = run_pass(
                at[s.q], at[s.k], at[s.v], g_gamma=log_decay, scale=case.scale, **given
            )
            ends.append(end)
        return (at["o"], *ends)

    if workload == "step":
        keep = {"output_final_state": True}
        first, last = ([x[:, part].contiguous() for x in (q, k, v)] for part in PARTS)
        _, *past = chain(first[0], first[1], first[2], **keep)

        def step() -> Arrays:
            o, *_ = chain(last[0], last[1], last[2], past, **keep)
            return (o[:, 0],)

        return Work(Call(step, lib), against_truth(workload, case), LIMIT)

    truth = against_truth(workload, case)

    def error(got: Arrays) -> float:
        return truth(tuple(x.swapaxes(1, 2) for x in got))

    return _compiled(workload, lib, lambda q, k, v: chain(q, k, v)[0], (q, k, v, do), error)


def chunked(xp: Any, operator: str, q: Array, k: Array, v: Array) -> Array:
    """Compute an operator the straightforward way: all chunks at once, states by a running sum."""
    T = q.shape[-2]
    chunks = (*q.shape[:-2], -1, CHUNK)
    rest = [(0, 0)] * (q.ndim - 2) + [(0, -T % CHUNK), (0, 0)]
    q, k, v = (xp.pad(x, rest).reshape(*chunks, x.shape[-1]) for x in (q, k, v))

    def first_order(q: Array, k: Array, v: Array) -> Array:
        own = k.mT @ v
        before = xp.cumsum(own, axis=-3) - own
        return xp.tril(q @ k.mT) @ v + q @ before

    if operator == "linear":
        o = first_order(q, k, v)
    elif operator == "hla2":
        o = first_order(q, first_order(q, k, k), v)
    elif operator == "ahla":
        o = first_order(q, k, first_order(q, k, v))
    else:
        o = first_order(q, first_order(q, k, k), first_order(q, k, v))
    return o.reshape(*o.shape[:-3], -1, o.shape[-1])[..., :T, :]


def _numpy_chunks(workload: str, case: Case, accelerator: bool) -> Work:
    q, k, v = inputs(case)[:3]

    def run() -> Arrays:
        return (chunked(np, case.operator, q * np.asarray(case.scale, q.dtype), k, v),)

    return Work(Call(run, load("numpy", False)), against_truth(workload, case), LIMIT)


def _jnp_chunks(workload: str, case: Case, accelerator: bool) -> Work:
    lib = load("jax", accelerator)
    import jax.numpy as jnp

    q, k, v, do = (lib.array(x, case.dtype) for x in inputs(case)[:4])
    wide = jnp.float64 if case.dtype == "float64" else jnp.float32

    def function(q: Array, k: Array, v: Array) -> Array:
        o = chunked(jnp, case.operator, q.astype(wide) * case.scale, k.astype(wide), v.astype(wide))
        return o.astype(v.dtype)

    error = against_truth(workload, case)
    return _compiled(workload, lib, function, (q, k, v, do), error)


def advance(operator: str, states: tuple[Host, Host], q: Host, k: Host, v: Host) -> Host:
    """Take one token, (*batch, D), through states that are updated in place; return its output."""
    S, F = states

    def read(q: Host, state: Host) -> Host:
        return np.asarray((q[..., None, :] @ state)[..., 0, :])

    def learn(state: Host, k: Host, v: Host) -> None:
        state += k[..., :, None] * v[..., None, :]

    if operator == "linear":
        learn(F, k, v)
    elif operator == "hla2":
        learn(S, k, k)
        learn(F, read(q, S), v)
    elif operator == "ahla":
        learn(S, k, v)
        learn(F, k, read(q, S))
    else:
        D = k.shape[-1]
        learn(S, k, np.concatenate([k, v], axis=-1))
        both = read(q, S)
        learn(F, both[..., :D], both[..., D:])
    return read(q, F)


def _numpy_tokens(workload: str, case: Case, accelerator: bool) -> Work:
    lib = load("numpy", False)
    q, k, v = inputs(case)[:3]
    q = q * np.asarray(case.scale, q.dtype)
    D = case.width

    def empty() -> tuple[Host, Host]:
        wide = 2 * D if case.operator == "hla3" else D
        S, F = (np.zeros((*case.shape[:2], D, width), q.dtype) for width in (wide, D))
        return S, F

    def take(t: int, states: tuple[Host, Host]) -> Host:
        return advance(case.operator, states, q[:, :, t], k[:, :, t], v[:, :, t])

    def scan() -> Arrays:
        states, o = empty(), np.empty_like(v)
        for t in range(case.tokens):
            o[:, :, t] = take(t, states)
        return (o,)

    return Work(Call(scan, lib), against_truth(workload, case), LIMIT)


def lines(operator: str, q: Array, k: Array, v: Array, state: Arrays) -> Arrays:
    """Do a step as bare lines of any library, the denominators' states too: (o, *state)."""

    def outer(k: Array, v: Array) -> Array:
        return k[..., :, None] * v[..., None, :]

    def read(q: Array, S: Array) -> Array:
        return (q[..., None, :] @ S)[..., 0, :]

    def weight(q: Array, m: Array) -> Array:
        return (q[..., None, :] @ m[..., :, None])[..., 0]

    if operator == "linear":
        P, m = state
        P, m = P + outer(k, v), m + k
        return read(q, P), P, m
    if operator == "hla2":
        S, F, eta = state
        S = S + outer(k, k)
        y = read(q, S)
        F, eta = F + outer(y, v), eta + y
        return read(q, F), S, F, eta
    if operator == "ahla":
        P, m, E, n = state
        P, m = P + outer(k, v), m + k
        E, n = E + outer(k, read(q, P)), n + k * weight(q, m)
        return read(q, E), P, m, E, n
    S, P, m, F, eta = state
    S, P, m = S + outer(k, k), P + outer(k, v), m + k
    y = read(q, S)
    F, eta = F + outer(y, read(q, P)), eta + y * weight(q, m)
    return read(q, F), S, P, m, F, eta


def _lines(library: str, workload: str, case: Case, accelerator: bool) -> Work:
    lib, last = load(library, accelerator), case.tokens - 1
    if case.dtype == "bfloat16":
        raise NotImplementedError("bare lines are timed in float32 and float64")
    q, k, v = inputs(case)[:3]
    q = q * np.asarray(case.scale, q.dtype)
    options: dict[str, Any] = {"operator": case.operator, "backend": "array_api"}
    past = (x[:, :, :last] for x in (q, k, v))
    _, state = hla.scan(*past, return_state=True, **options)
    token = [lib.array(x[:, :, last], case.dtype) for x in (q, k, v)]
    given = tuple(lib.array(x, case.dtype) for x in state)
    step = compiler(lib, workload)(functools.partial(lines, case.operator))
    return Work(Call(lambda: step(*token, given), lib), against_truth("step", case), LIMIT)


def _fla_peer(kernel: str, workloads: tuple[str, ...]) -> Peer:
    return Peer("torch", workloads, (GPU,), functools.partial(_fla, kernel), ("none", "decay"))


BOTH_WAYS = ("forward", "forward + backward")
PEERS = {
    "torch SDPA": Peer("torch", (*BOTH_WAYS, "step"), (CPU, GPU), _attention),
    "FLA": _fla_peer("chunk_simple_gla", (*BOTH_WAYS, *HOST[:2])),
    "FLA fused": _fla_peer("fused_chunk_simple_gla", ("forward",)),
    "FLA recurrent": _fla_peer("fused_recurrent_simple_gla", ("step", HOST[2])),
    "jax SDPA": Peer("jax", BOTH_WAYS, (GPU,), _jax_attention),
    "jnp chunks": Peer("jax", BOTH_WAYS, (CPU, GPU), _jnp_chunks),
    "NumPy chunks": Peer("numpy", ("forward",), (CPU,), _numpy_chunks),
    "NumPy tokens": Peer("numpy", ("forward",), (CPU,), _numpy_tokens),
    "NumPy lines": Peer("numpy", ("step",), (CPU,), functools.partial(_lines, "numpy")),
    "jnp lines": Peer("jax", ("step",), (CPU,), functools.partial(_lines, "jax")),
    "torch lines": Peer("torch", ("step", COMPILED), (CPU,), functools.partial(_lines, "torch")),
}

SOFTMAX = "torch SDPA", "jax SDPA"  # another function than HLA, whose time grows by T squared


def operations(workload: str, case: Case) -> float:
    """Floating-point operations of a workload, as the top of this file counts them."""
    width = dict.fromkeys(("q", "k", "v"), case.width)
    multiply_adds = 0
    for s in CAUSAL[case.operator]:
        K, U = width[s.k], width[s.v]
        multiply_adds += CHUNK * (K + U) + 2 * K * U
        width[s.out] = U
    passes = 4 if workload == "forward + backward" else 1
    return 2.0 * passes * multiply_adds * case.batch * case.heads * case.tokens


def compulsory_bytes(workload: str, case: Case) -> float:
    """Bytes that must move: q, k, v in and o out; backward: q, k, v, do in and dq, dk, dv out."""
    arrays = 11 if workload == "forward + backward" else 4
    return float(arrays * case.bytes)


class Floor(NamedTuple):
    """The calls whose rates are the machine's own: what they do in one call, by unit."""

    product: Call
    product_operations: float
    copy: Call | None
    copied_bytes: float

    def seconds(self, workload: str, case: Case, product: float, copy: float) -> float | None:
        """Least time of a workload from the seconds that the two calls took in the same run."""
        if workload not in BOTH_WAYS:
            return None
        least = operations(workload, case) / (self.product_operations / product)
        if self.copy is None:
            return least
        return max(least, compulsory_bytes(workload, case) / (self.copied_bytes / copy))


def _multiplies() -> str:
    libraries = "cupy", "torch", "jax"
    for name in libraries:
        with contextlib.suppress(NotImplementedError):
            load(name, True)
            return name
    raise NotImplementedError(
        "the floor of Numba's rows is measured by another library's matrix product, and none is "
        f"installed for this accelerator: install one of {', '.join(libraries)}"
    )


@functools.lru_cache(maxsize=2)  # one of the host, one of the accelerator
def floor(dtype: str, library: str = "numpy", accelerator: bool = False) -> Floor:
    """Prepare the floor of one machine.

    On the host NumPy's matmul of 2048^3 in float32 (float64 for float64) and no copy, whatever the
    library; on an accelerator its library's matmul of 8192^3 in ``dtype`` and a pass over 1 GiB.
    Numba multiplies no matrices: in its place stands the first of CuPy, torch and JAX that is here.
    """
    if not accelerator:
        dtype, library = "float64" if dtype == "float64" else "float32", "numpy"
    elif library == "numba":
        library = _multiplies()
    lib, N = load(library, accelerator), 8192 if accelerator else 2048
    draws = np.random.default_rng(0).standard_normal((2, N, N), dtype=np.float32)
    a, b = (lib.array(x, dtype) for x in draws)

    def multiply(a: Array, b: Array) -> Arrays:
        with library_of(a).exact_products(a):  # float32 rows need float32's rate
            return (a @ b,)

    product = lib.compile(multiply)
    copy, copied = None, 0.0
    if accelerator:
        x = lib.array(np.ones((1 << 14, 1 << 14), np.float32), "float32")
        shift = lib.compile(lambda x: (x + 1,))
        copy, copied = Call(lambda: shift(x), lib), 2.0 * math.prod(x.shape) * 4
    return Floor(Call(lambda: product(a, b), lib), 2.0 * N**3, copy, copied)
