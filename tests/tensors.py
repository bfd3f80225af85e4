"""Calls of a kernel backend on tensors of its device, against the core in float64."""

import functools
import math
import os

import numpy as np
from conftest import budget, draw, errors, installed, to_numpy, usable
from terms import gates_within_budget, parts

import hla

torch = installed("torch")
ENTRY = next(entry for entry in hla.available() if entry.name == "triton")
usable(ENTRY)  # the suites of a Triton that is broken fail, they are not skipped
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
W = 64  # the widest chunk of the launch table
H = 2


def patch_once():
    """Have the interpreter patch Triton's language once a launch, which inner functions see too.

    It does so again for every call of an inner function, which is half of the time of a launch.
    """
    from triton.runtime import interpreter

    patch, known = interpreter._patch_lang, interpreter.InterpretedFunction.rewritten_fn
    interpreter._patch_lang = lambda fn: None if fn in known else patch(fn)


if ENTRY.available and DEVICE == "cpu":
    patch_once()


def tensor(x, dtype="float32"):
    return torch.tensor(np.asarray(x), dtype=getattr(torch, dtype), device=DEVICE)


def each(f, x):
    """Apply f to an array or to every array of a NamedTuple."""
    if x is None:
        return None
    return type(x)(*(each(f, y) for y in x)) if hasattr(x, "_fields") else f(x)


def rounded(x, dtype="float32"):
    """NumPy values of float64 that the dtype can hold."""
    return each(lambda y: to_numpy(tensor(y, dtype).cpu().double()), x)


def gate_of(kind, T, heads=H):
    """A gate by its name, in float64 that float32 can hold; resets within and at ends of chunks."""
    if kind == "none":
        return {}
    if kind == "per_head":
        return {"decay": rounded(np.linspace(0.6, 1.0, heads))}
    a = -np.random.default_rng([heads, T]).random((heads, T)) * 0.3
    a[0, [t for t in (0, 5, 6, W - 1, W, T - 1) if 0 <= t < T]] = -np.inf
    return {"log_gate": rounded(a)}


def inputs_of(T, gate="none", dtype="float32", *, D=24, V=11, positive=False, heads=H, seed=0):
    q, k, v = (rounded(x, dtype) for x in draw(heads, T, D=D, V=V, positive=positive, seed=seed))
    return {"q": q, "k": k, "v": v} | gate_of(gate, T, heads)


def as_tensors(inputs, dtype="float32"):
    """The same call's arrays as tensors: q, k, v in the dtype, gates and states in float32."""
    return {n: each(lambda x, d=dtype if n in "qkv" else "float32": tensor(x, d), inputs[n])
            for n in inputs}  # fmt: skip


def run(arrays, options, given, backend):
    """Output, states by field and every gradient by name."""
    found, pullback = hla.vjp(**arrays, backend=backend, **options)
    o, *state = found if options.get("return_state") else (found,)
    results = {"o": o}
    for x in state:
        results |= {f"state {n}": y for n, y in x._asdict().items()}
    gradients = pullback(*given)._asdict()
    start = gradients.pop("dinitial_state")
    results |= {n: x for n, x in gradients.items() if x is not None}
    if start is not None:
        results |= {f"dstate {n}": y for n, y in start._asdict().items()}
    for name in results.keys() & {"dstate S", "dstate Q"}:  # the rest of it is nobody's
        results[name] = results[name] + results[name].mT
    return results


def cotangents(inputs, options, dtype):
    """A random cotangent of the output and, where a state is asked, of the last state."""
    rng = np.random.default_rng(11)
    shape = np.broadcast_shapes(*(inputs[n].shape[:-1] for n in "qkv"))
    do = rounded(rng.standard_normal((*shape, inputs["v"].shape[-1])), dtype)
    if not options.get("return_state"):
        return (do,)
    few = {n: x[..., :1, :] if n in "qkv" else x for n, x in inputs.items()}
    if "log_gate" in few:
        few["log_gate"] = np.zeros((*few["log_gate"].shape[:-1], few["q"].shape[-2]))
    _, state = hla.scan(**few, backend="array_api", **options)
    return do, each(lambda x: rounded(rng.standard_normal(x.shape)), state)


def measured(got, want):
    """Errors of a result of any rank, whole and of the worst block; a vector is a column."""
    assert got.shape == want.shape
    lead = (1,) * (3 - want.ndim)
    return errors(got.reshape(*lead, *got.shape), want.reshape(*lead, *want.shape))


def check(inputs, options, dtype="float32"):
    """Output, state and every gradient of a call within the budget of its dtype.

    The budget is for sums that do not cancel. Of a quotient's gradients, and of the paper's
    letters, which are differences, errors are relative to the `parts` that are added.
    """
    given = cotangents(inputs, options, dtype)
    mine = as_tensors(inputs, dtype)
    own = [tensor(given[0], dtype), *(each(tensor, x) for x in given[1:])]
    got = run(mine, options, own, "triton")
    want = run(inputs, options, given, "array_api")
    assert got.keys() == want.keys()
    size = {"D": max(inputs["q"].shape[-1], inputs["v"].shape[-1]), "T": inputs["q"].shape[-2]}
    size |= {"decay": inputs.get("decay"), "operator": options["operator"]}
    letters = options.get("convention") == "paper"
    sums = parts(inputs, options, given) if letters or options.get("normalize") else {}
    for name, y in want.items():
        x = got[name]
        assert x.device.type == DEVICE
        like = {"o": "v", "dq": "q", "dk": "k", "dv": "v"}.get(name)
        assert x.dtype == (mine[like].dtype if like else torch.float32)
        x = to_numpy(x.detach().cpu().double())
        if name in ("ddecay", "dlog_gate"):
            gates_within_budget(x, y, dtype, inputs, options, given, options["operator"])
            continue
        if name in sums and (letters or name != "o"):
            x, y = sums[name] + x - y, sums[name]
        if name.split()[-1][0].islower() and " " in name:  # a mass
            x, y = x[..., None], y[..., None]
        allowed = budget(dtype, gradient=name.startswith("d"), **size)
        for found, most in zip(measured(x, y), allowed, strict=True):
            assert found <= most, f"{name}: error {found:.2e}, allowed {most:.2e}"


def bits(got, want):
    """Assert equal bits of two results of `hla.scan` or of gradients, NaN where NaN is."""
    assert type(got).__name__ == type(want).__name__
    if isinstance(want, tuple):
        for x, y in zip(got, want, strict=True):
            bits(x, y)
    elif want is not None:
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def everything(arrays, do, **options):
    """Output, last state and gradients of a call by Triton."""
    (o, state), pullback = hla.vjp(**arrays, backend="triton", return_state=True, **options)
    return o, state, *pullback(do, state)[:5]


def poison_empty(monkeypatch):
    """Have what torch allocates hold NaN, so that what was never written shows in a result."""
    for name in ("empty", "empty_strided"):
        allocate = getattr(torch, name)

        @functools.wraps(allocate)
        def poisoned(*args, allocate=allocate, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(math.nan) if x.is_floating_point() else x

        monkeypatch.setattr(torch, name, poisoned)


INTEGERS = [(64, 130, 0.03), (32, 67, 0.06)]  # D, T, density


def integers(D, T, density, V=9):
    """Sparse ternary q, k, do and small integer v: every sum is exact in any order."""
    rng = np.random.default_rng([D, T])
    p = [density / 2, 1 - density, density / 2]
    q, k = rng.choice([-1.0, 0.0, 1.0], (2, 2, T, D), p=p)
    do = rng.choice([-1.0, 0.0, 1.0], (2, T, V), p=p)
    return {"q": q, "k": k, "v": rng.integers(-4, 5, (2, T, V)).astype(float)}, do
