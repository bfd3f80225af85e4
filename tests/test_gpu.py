"""CuPy, torch and JAX on a GPU: the same code, within the float32 budget of NumPy in float64."""

import itertools
import math
import os
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
from conftest import OPERATORS, budget, errors, installed, to_numpy
from tensors import (
    DEVICE,
    ENTRY,
    INTEGERS,
    H,
    as_tensors,
    bits,
    check,
    everything,
    inputs_of,
    integers,
    poison_empty,
    run,
    tensor,
)
from terms import gates_within_budget

import hla

torch = installed("torch")

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::hla.SlowPathWarning")]
LIBRARIES = ("cupy", "torch", "jax")
SHAPE = (2, 3, 300, 24)
FLOAT32 = 4 * 2.0**-24 * (2 + 0.2 * 24**0.5 + 0.3 * (300 / 64) ** 0.5)  # the budget for T, D, W


def arrays(library, *xs):
    """NumPy arrays as arrays of a library on its GPU, and the way back; skips without one."""
    xp = installed(library)
    if library == "cupy":
        if not xp.is_available():
            pytest.skip("no CUDA device for cupy")
        return [xp.asarray(x) for x in xs], xp.asnumpy
    if library == "torch":
        if not xp.cuda.is_available():
            pytest.skip("no CUDA device for torch")
        return [xp.tensor(x, device="cuda") for x in xs], lambda x: x.cpu().numpy()
    if xp.default_backend() != "gpu":
        pytest.skip("no GPU for jax")
    return [xp.numpy.asarray(x) for x in xs], np.asarray


def draw():
    rng = np.random.default_rng(0)
    q, k, v, do = (rng.normal(size=SHAPE).astype(np.float32) for _ in range(4))
    gate = -rng.uniform(0, 0.1, size=SHAPE[:-1]).astype(np.float32)
    gate[..., 100] = -np.inf
    return q, k, v, do, gate


def off(got, want):
    """Largest relative RMS error of a head."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all()
    axes = tuple(range(2, want.ndim))
    return (((got - want) ** 2).sum(axes) ** 0.5 / (want**2).sum(axes) ** 0.5).max()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("mask", ["causal", "prefix"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_scan_and_gradient_within_the_budget(library, operator, mask, gated):
    host = draw()
    (q, k, v, do, gate), back = arrays(library, *host)
    options = {"operator": operator, "mask": mask, "return_state": True}
    (o, state), pullback = hla.vjp(q, k, v, log_gate=gate if gated else None, **options)
    grads = pullback(do)
    wide = [x.astype(np.float64) for x in host]
    (want, want_state), want_pullback = hla.vjp(
        *wide[:3], log_gate=wide[4] if gated else None, **options
    )
    want_grads = want_pullback(wide[3])
    assert type(o) is type(q)
    assert o.device == q.device
    assert off(back(o), want) < FLOAT32
    for x, y in zip(state, want_state, strict=True):
        assert off(back(x), y) < FLOAT32
    for name in ("dq", "dk", "dv"):
        assert off(back(getattr(grads, name)), getattr(want_grads, name)) < 1.5 * FLOAT32
    if gated:
        given = dict(zip(("q", "k", "v", "log_gate"), (*wide[:3], wide[4]), strict=True))
        found = back(grads.dlog_gate).astype(np.float64)
        gates_within_budget(found, want_grads.dlog_gate, "float32", given, options, wide[3:4])


@pytest.mark.parametrize("library", LIBRARIES)
def test_steps_continue_a_scan(library):
    host = draw()
    (q, k, v, *_), back = arrays(library, *host)
    whole = hla.scan(q, k, v, decay=0.9)
    first = (x[..., :-1, :] for x in (q, k, v))
    _, state = hla.scan(*first, decay=0.9, return_state=True)
    last, _ = hla.step(q[..., -1, :], k[..., -1, :], v[..., -1, :], state, decay=0.9)
    assert off(back(last)[..., None, :], back(whole)[..., -1:, :]) < 2 * FLOAT32


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_slow_path_is_said_once(library):
    """Where no kernel serves; torch has Triton's."""
    (q, k, v), _ = arrays(library, *draw()[:3])
    hla.dispatch._warned.clear()
    if library == "torch":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hla.scan(q, k, v)
        assert hla.explain(q, k, v).backend == "triton"
        return
    with pytest.warns(hla.SlowPathWarning, match="no kernel backend"):
        hla.scan(q, k, v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hla.scan(q, k, v)


needs_triton = pytest.mark.skipif(
    not ENTRY.available or DEVICE != "cuda", reason=ENTRY.reason or "Triton is interpreted"
)
NARROW = ("bfloat16", "float16", "float32")
GATES = ("none", "per_head", "resets")
MASKS_AND_GATES = [*itertools.product(("causal", "prefix"), GATES), ("none", "none")]


@needs_triton
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("mask", "gate"), MASKS_AND_GATES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_triton_within_the_budget(operator, mask, gate, dtype):
    """Output, states and gradients, by head and block of 64 tokens."""
    options = {"operator": operator, "mask": mask, "scale": 64**-0.75}  # hla3 stays in float16
    options |= {"return_state": mask != "none"}
    check(inputs_of(301, gate, dtype, D=64, V=48, heads=3), options, dtype)


@needs_triton
@pytest.mark.parametrize("gate", ["none", "per_head", "resets"])
@pytest.mark.parametrize("mask", ["causal", "prefix"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("D", "state"), [(64, False), (128, False), (128, True)])
def test_triton_within_the_budget_where_the_device_is_full(D, state, operator, mask, gate):
    """More heads than multiprocessors: loads and products of many chunks overlap."""
    options = {"operator": operator, "mask": mask, "scale": D**-0.75, "return_state": state}
    check(inputs_of(700, gate, "bfloat16", D=D, V=D, heads=150), options, "bfloat16")


@needs_triton
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("gate", ["none", "resets"])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("operator", OPERATORS)
def test_triton_normalizes_within_the_budget(operator, D, gate, dtype):
    """Masses beside the values, and beside the keys in the adjoint."""
    options = {"operator": operator, "scale": D**-0.75, "normalize": True}
    check(inputs_of(301, gate, dtype, D=D, V=D, heads=3, positive=True), options, dtype)


@needs_triton
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("operator", OPERATORS)
def test_triton_within_the_budget_over_many_tokens(operator, D, dtype):
    inputs = inputs_of(4096, "none", dtype, D=D, V=D)
    decay = (0.9, 0.99) if dtype == "float16" else (0.999, 1.0)  # float16 has not hla3's range
    inputs["decay"] = np.array(decay, np.float32).astype(np.float64)
    check(inputs, {"operator": operator, "scale": D**-0.75, "return_state": True}, dtype)


@needs_triton
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    ("T", "D", "V", "gate"),
    [
        (67, 257, 15, "resets"),
        (130, 100, 129, "resets"),
        (63, 1, 257, "resets"),
        (1, 24, 65, "none"),
    ],
)
@pytest.mark.parametrize("operator", ["hla2", "ahla"])
def test_triton_widths(operator, T, D, V, gate, dtype):
    """Enough heads for a block's thousand numbers; positive where q.k is a head's only one."""
    options = {"operator": operator, "scale": D**-0.5, "return_state": True}
    check(inputs_of(T, gate, dtype, D=D, V=V, heads=48, positive=T == 1), options, dtype)


@needs_triton
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("D", "T", "density"), [*INTEGERS, (128, 130, 0.02)])
@pytest.mark.parametrize("mask", ["causal", "prefix", "none"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_triton_exact_integers(operator, mask, D, T, density, dtype):
    """Outputs and states, and gradients where no intermediate one is rounded: the oracle's bits."""
    inputs, do = integers(D, T, density, V=40)
    if dtype == "bfloat16":  # exact to 256: what a chunk reads of a state, and what a step hands on
        inputs["v"] = np.sign(inputs["v"])
    options = {"operator": operator, "mask": mask, "return_state": mask != "none"}
    want = run(inputs, options, (do,), "array_api")
    got = run(as_tensors(inputs, dtype), options, (tensor(do, dtype),), "triton")
    exact = dtype == "float32" or (dtype == "float16" and D == 32)
    for name, x in want.items():
        if name.startswith(("o", "state")) or exact:
            bits(got[name], tensor(x, dtype if name in ("o", "dq", "dk", "dv") else "float32"))


def surrounded(x, value=math.nan):
    """A view of x inside of an allocation that holds NaN on every side."""
    wide = x.new_full([n + 4 for n in x.shape], value)
    inner = wide[tuple(slice(2, -2) for _ in x.shape)]
    inner.copy_(x)
    return inner


@needs_triton
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("operator", OPERATORS)
def test_triton_reads_and_writes_nothing_outside(operator, dtype, monkeypatch):
    """NaN around the inputs and in what torch allocates; memory beside the outputs stays."""
    arrays = as_tensors(inputs_of(131, "resets", dtype, D=60, V=33), dtype)
    do = tensor(np.random.default_rng(0).standard_normal((H, 131, 33)), dtype)
    want = everything(arrays, do, operator=operator)
    poison_empty(monkeypatch)
    bits(everything({n: surrounded(x) for n, x in arrays.items()}, surrounded(do),
                    operator=operator), want)  # fmt: skip


@needs_triton
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_triton_repeats_to_the_bit(operator, dtype):
    arrays = as_tensors(inputs_of(1000, "resets", dtype, D=128, V=128, heads=8), dtype)
    do = tensor(np.random.default_rng(0).standard_normal((8, 1000, 128)), dtype)
    want = everything(arrays, do, operator=operator)
    for _ in range(100):
        bits(everything(arrays, do, operator=operator), want)


@needs_triton
@pytest.mark.parametrize("operator", ["hla2", "hla3"])
def test_triton_bits_hang_on_no_other_head(operator):
    """From one head to forty, alone or with others, by the same kernels; float32 and bfloat16."""
    from hla.kernels.triton import run

    def compiled():
        steps = (
            do for ready in run.RUNNER.ready.values() for turn in ready.turns for do in turn.do
        )
        return {id(do.compiled) for do in steps if isinstance(do, run.Kernel)}

    for dtype in ("bfloat16", "float32"):
        arrays = as_tensors(inputs_of(500, "per_head", dtype, D=64, V=64, heads=40), dtype)
        do = tensor(np.random.default_rng(0).standard_normal((40, 500, 64)), dtype)
        o, state, *gradients = everything(arrays, do, operator=operator)
        before = compiled()
        for part in (slice(0, 1), slice(39, 40), slice(7, 20)):
            some = {n: x[part] for n, x in arrays.items()}
            one, end, *found = everything(some, do[part], operator=operator)
            bits(one, o[part])
            bits(end, type(state)(*(x[part] for x in state)))
            bits(tuple(found[:4]), tuple(x[part] for x in gradients[:4]))
        assert compiled() == before


def long_tensors(dtype=None, T=2048, grad=False, heads=16):
    shape = (2, heads, T, 128)
    made = [torch.randn(shape, device="cuda").to(dtype or torch.bfloat16) for _ in range(4)]
    return [x.requires_grad_(grad and i < 3) for i, x in enumerate(made)]


@needs_triton
def test_triton_runs_on_the_callers_stream():
    """Inputs made and results read on a side stream, behind work that keeps it busy."""
    q, k, v, do = long_tensors()
    busy = torch.randn(4096, 4096, device="cuda")
    want = everything({"q": q, "k": k, "v": v}, do)
    torch.cuda.synchronize()
    for _ in range(5):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                busy = busy @ busy * 1e-3
            late = [torch.empty_like(x) for x in (q, k, v, do)]
            for x, y in zip(late, (q, k, v, do), strict=True):
                x.copy_(y)
            got = everything(dict(zip("qkv", late, strict=False)), late[3])
            del late
            bits(got, want)  # on the same stream


@needs_triton
@pytest.mark.parametrize("gradient", [False, True])
def test_triton_in_cuda_graphs(gradient):
    """Captured once, replayed on other values."""
    q, k, v, do = long_tensors(T=500, grad=gradient)
    decay = torch.full((16,), 0.9, device="cuda", requires_grad=gradient)
    inputs = (q, k, v, decay)

    def call():
        o = hla.scan(q, k, v, decay=decay, scale=0.1)
        return (o, *(torch.autograd.grad(o, inputs, do) if gradient else ()))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for x in (q, k, v, do):
                x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        bits(tuple(x.detach() for x in captured), tuple(x.detach() for x in call()))


@needs_triton
@pytest.mark.parametrize("gate", ["none", "decay", "log_gate"])
def test_triton_never_waits_for_the_device(gate):
    q, k, v, do = long_tensors(T=500, grad=True)
    options = {
        "none": {}, "decay": {"decay": torch.full((16,), 0.9, device="cuda")},
        "log_gate": {"log_gate": torch.full((2, 16, 500), -0.1, device="cuda")},
    }[gate]  # fmt: skip
    for x in options.values():
        x.requires_grad_()

    def call():
        o, state = hla.scan(q, k, v, return_state=True, **options)
        hla.step(*(x[..., 0, :] for x in (q, k, v)), state)
        o.backward(do)

    call()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        hla.scan(q.detach(), k, v, decay=0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_triton
def test_triton_beyond_two_to_the_31_elements():
    """The last head of [B, T, H, D] tensors lies beyond; the bits of the same head alone."""
    B, T, heads, D = 2, 70_000, 256, 64
    assert (B * T - 1) * heads * D > 2**31
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip(f"{free >> 30} GiB free, 24 needed")
    x = torch.empty(B, T, heads, D, dtype=torch.bfloat16, device="cuda")
    x.normal_(std=0.2)
    last = x[-1:, :, -1:].clone()
    # the same memory thrice: q, k and v of one tensor
    o = hla.scan(x, x, x, axis=-3, decay=0.9, scale=0.1)
    one = hla.scan(last, last, last, axis=-3, decay=0.9, scale=0.1)
    bits(o[-1:, :, -1:].contiguous(), one)
    assert torch.isfinite(one).all()


@needs_triton
@pytest.mark.parametrize("operator", OPERATORS)
def test_triton_in_a_compiled_model(operator):
    torch._dynamo.reset()
    q, k, v, do = long_tensors(T=300, grad=True, heads=4)

    def f(q, k, v):
        return hla.scan(2 * q, torch.relu(k), v, operator=operator, decay=0.9, scale=0.05) * 3

    compiled = torch.compile(f, fullgraph=True)
    o, want = compiled(q, k, v), f(q, k, v)
    bits(o.detach(), want.detach())
    bits(torch.autograd.grad(o, (q, k, v), do), torch.autograd.grad(want, (q, k, v), do))


@needs_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("library", ["cupy", "jax"])
def test_triton_on_arrays_of_other_libraries(library, dtype):
    """Read where they lie; results are the caller's arrays and torch's bits; gradients too."""
    host = draw()
    torch_arrays = [tensor(x, dtype) for x in host[:4]] + [tensor(host[4])]
    if library == "cupy":
        xp = installed("cupy")
        mine = [xp.from_dlpack(x) for x in torch_arrays]
        pointers = [x.data.ptr for x in mine]
    else:
        xp = installed("jax")
        if xp.default_backend() != "gpu":
            pytest.skip("no GPU for jax")
        mine = [xp.dlpack.from_dlpack(x) for x in torch_arrays]
        pointers = [x.unsafe_buffer_pointer() for x in mine]
    seen = []
    from hla.libraries import exchange

    real = exchange.to_torch

    def spy(x):
        y = real(x)
        seen.append(y.data_ptr())
        return y

    exchange.to_torch = spy
    try:
        q, k, v, do, gate = mine
        (o, state), pullback = hla.vjp(q, k, v, log_gate=gate, return_state=True, backend="triton")
        gradients = pullback(do, state)
    finally:
        exchange.to_torch = real
    assert set(pointers) <= set(seen)  # no copy on the way in
    q, k, v, do, gate = torch_arrays
    want = everything({"q": q, "k": k, "v": v, "log_gate": gate}, do)
    got = (o, *state, *gradients[:3], gradients.dlog_gate)
    for x, y in zip(got, (want[0], *want[1], *want[2:5], want[6]), strict=True):
        assert type(x) is type(mine[0])
        bits(torch.from_dlpack(x), y)
    token = [x[..., 0, :] for x in mine[:3]]
    o, _ = hla.step(*token, state, backend="triton")
    assert type(o) is type(mine[0])


@needs_triton
def test_triton_steps():
    """Steps continue a scan, and are the scan of a token."""
    for dtype in NARROW:
        arrays = as_tensors(inputs_of(70, "per_head", dtype, D=64, V=64), dtype)
        decay = arrays.pop("decay")
        _, state = hla.scan(**{n: x[:, :-1] for n, x in arrays.items()}, decay=decay,
                            return_state=True)  # fmt: skip
        last = {n: x[:, -1:] for n, x in arrays.items()}
        want = hla.scan(**last, decay=decay, initial_state=state, return_state=True)
        o, end = hla.step(*(x[:, 0] for x in last.values()), state, decay=decay)
        bits((o[:, None], end), want)
        assert hla.explain(**arrays, decay=decay).backend == "triton"


@needs_triton
def test_triton_runs_where_the_arrays_are():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    q, k, v, _ = (x.to("cuda:1") for x in long_tensors(T=100))
    with torch.cuda.device(0):
        o = hla.scan(q, k, v)
        assert torch.cuda.current_device() == 0
    assert o.device == q.device
    want = hla.scan(*(x.to("cuda:0") for x in (q, k, v)))
    bits(o.to("cuda:0"), want)
    with pytest.raises(ValueError, match=r"\bk\b.*cuda:0"):
        hla.scan(q, k.to("cuda:0"), v)


@needs_triton
@pytest.mark.parametrize("operator", OPERATORS)
def test_triton_memory(operator):
    """Beyond inputs, outputs and gradients: at most three tensors of q's size."""
    q, k, v, do = long_tensors(T=4096, grad=True)
    hla.scan(q, k, v, operator=operator, decay=0.9).backward(do)  # compiles, allocates gradients
    for x in (q, k, v):
        x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, size = torch.cuda.memory_allocated(), q.numel() * q.element_size()
    o = hla.scan(q, k, v, operator=operator, decay=0.9)
    gradients = torch.autograd.grad(o, (q, k, v), do)
    peak = torch.cuda.max_memory_allocated() - before
    results = sum(x.numel() * x.element_size() for x in (o, *gradients))
    assert peak - results <= 3 * size * (1 + 1e-3), f"{(peak - results) / size:.2f} of q"


@needs_triton
def test_triton_float32_is_not_tf32_unless_torch_says_so():
    inputs = inputs_of(500, D=128, V=128)
    arrays = as_tensors(inputs)
    want = hla.scan(**inputs, scale=0.1)
    assert "reduced precision" not in hla.explain(**arrays).plan
    o = hla.scan(**arrays, scale=0.1)
    exact = errors(to_numpy(o.cpu().double()), want)[0]
    assert exact <= budget("float32", D=128, T=500)[0]
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert "reduced precision" in hla.explain(**arrays).plan
        o = hla.scan(**arrays, scale=0.1)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    rough = errors(to_numpy(o.cpu().double()), want)[0]
    assert 10 * exact < rough <= 3.5 * 2.1e-4  # hla2's three roundings, and its inputs are rounded


@needs_triton
def test_triton_compiles_a_class_of_shapes_once(tmp_path):
    """A forward and backward with an empty cache compile few kernels; other lengths none."""
    code = """
        import pathlib, sys, torch, hla
        for B, H, T in ((1, 4, 200), (2, 3, 300)):
            q, k, v, do = (torch.randn(B, H, T, 96, device="cuda").bfloat16() for _ in range(4))
            for x in (q, k, v): x.requires_grad_()
            hla.scan(q, k, v).backward(do)
            torch.cuda.synchronize()
            print(len(list(pathlib.Path(sys.argv[1]).rglob("*.cubin"))))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = map(int, done.stdout.split())
    assert 0 < first == second <= 8


@needs_triton
def test_triton_shows_a_nan_in_the_gate():
    """On a device no value is checked: from its token on in its head, and nowhere else."""
    arrays = as_tensors(inputs_of(140, "resets"))
    want = hla.scan(**arrays)
    gate = arrays["log_gate"].clone()
    gate[0, 70] = math.nan
    got = hla.scan(**arrays | {"log_gate": gate})
    bits(got[1], want[1])
    bits(got[0, :64], want[0, :64])
    assert torch.isnan(got[0, 70:]).all()
