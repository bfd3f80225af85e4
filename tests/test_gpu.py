"""CuPy, torch and JAX on a GPU: the same code, within the float32 budget of NumPy in float64."""

import warnings

import numpy as np
import pytest
from conftest import OPERATORS, budget, errors, installed, serves
from devices import bits, devices, host, inputs_of, on_cuda, per_device
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
    options = {"operator": operator, "mask": mask, "return_state": True, "backend": "array_api"}
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
    """Where no kernel serves."""
    (q, k, v), _ = arrays(library, *draw()[:3])
    hla.dispatch._warned.clear()
    if served := [x.backend for x in devices() if (library, True) in serves(x.backend)]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hla.scan(q, k, v)
        assert hla.explain(q, k, v).backend == served[0]
        return
    with pytest.warns(hla.SlowPathWarning, match="no kernel backend"):
        hla.scan(q, k, v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hla.scan(q, k, v)


@pytest.mark.parametrize("axis", ["batch", "heads"])
def test_two_gpus_split_a_call(axis):
    """Each does its part of the batch or of the heads; keys that heads share have a sum of both."""
    jax = installed("jax")
    gpus = [x for x in jax.devices() if x.platform == "gpu"]
    if len(gpus) < 2:
        pytest.skip("fewer than two GPUs for jax")
    mesh = jax.sharding.Mesh(np.asarray(gpus[:2]), ("x",))
    names = {"batch": ("x", None), "heads": (None, "x")}[axis]

    def put(x):
        spec = (n if size > 1 else None for n, size in zip(names, x.shape, strict=False))
        spec = jax.sharding.PartitionSpec(*spec)
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    q, k, v, do, _ = (x[:, :2] for x in draw())
    k = k[:, :1]
    want, pullback = hla.vjp(*(x.astype(np.float64) for x in (q, k, v)))

    @jax.jit
    def both(q, k, v, do):
        o, pullback = hla.vjp(q, k, v)
        return o, *pullback(do)[:3]

    got = both(*map(put, (q, k, v, do)))
    assert got[0].sharding.spec[:2] == names
    for x, y in zip(got, (want, *pullback(do.astype(np.float64))[:3]), strict=True):
        assert off(x, y) < 4 * FLOAT32


def long_tensors(dtype=None, T=2048, grad=False, heads=16):
    shape = (2, heads, T, 128)
    made = [torch.randn(shape, device="cuda").to(dtype or torch.bfloat16) for _ in range(4)]
    return [x.requires_grad_(grad and i < 3) for i, x in enumerate(made)]


@per_device(where=on_cuda)
def test_runs_on_the_callers_stream(device):
    """Inputs made and results read on a side stream, behind work that keeps it busy."""
    q, k, v, do = long_tensors()
    busy = torch.randn(4096, 4096, device="cuda")
    want = device.everything({"q": q, "k": k, "v": v}, do)
    torch.cuda.synchronize()
    for _ in range(5):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                busy = busy @ busy * 1e-3
            late = [torch.empty_like(x) for x in (q, k, v, do)]
            for x, y in zip(late, (q, k, v, do), strict=True):
                x.copy_(y)
            got = device.everything(dict(zip("qkv", late, strict=False)), late[3])
            del late
            bits(got, want)  # on the same stream


@per_device("gradient", [False, True], where=on_cuda)
def test_in_cuda_graphs(device, gradient):
    """Captured once, replayed on other values."""
    q, k, v, do = long_tensors(T=500, grad=gradient)
    decay = torch.full((16,), 0.9, device="cuda", requires_grad=gradient)
    inputs = (q, k, v, decay)

    def call():
        o = hla.scan(q, k, v, decay=decay, scale=0.1, backend=device.backend)
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


@per_device("gate", ["none", "decay", "log_gate"], where=on_cuda)
def test_never_waits_for_the_device(device, gate):
    q, k, v, do = long_tensors(T=500, grad=True)
    options = {
        "none": {}, "decay": {"decay": torch.full((16,), 0.9, device="cuda")},
        "log_gate": {"log_gate": torch.full((2, 16, 500), -0.1, device="cuda")},
    }[gate]  # fmt: skip
    for x in options.values():
        x.requires_grad_()

    def call():
        o, state = hla.scan(q, k, v, return_state=True, backend=device.backend, **options)
        hla.step(*(x[..., 0, :] for x in (q, k, v)), state, backend=device.backend)
        o.backward(do)

    call()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        hla.scan(q.detach(), k, v, decay=0.9, backend=device.backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@per_device(where=on_cuda)
def test_beyond_two_to_the_31_elements(device):
    """The last head of [B, T, H, D] tensors lies beyond; the bits of the same head alone."""
    B, T, heads, D = 66, 2000, 256, 64  # tokens of which one head is not cut into segments
    assert (B * T - 1) * heads * D > 2**31
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip(f"{free >> 30} GiB free, 24 needed")
    x = torch.empty(B, T, heads, D, dtype=torch.bfloat16, device="cuda")
    x.normal_(std=0.2)
    last = x[-1:, :, -1:].clone()
    # the same memory thrice: q, k and v of one tensor
    options = {"axis": -3, "decay": 0.9, "scale": 0.1, "backend": device.backend}
    o = hla.scan(x, x, x, **options)
    one = hla.scan(last, last, last, **options)
    bits(o[-1:, :, -1:].contiguous(), one)
    assert torch.isfinite(one).all()


@per_device("operator", OPERATORS, where=on_cuda)
def test_in_a_compiled_model(device, operator):
    torch._dynamo.reset()
    q, k, v, do = long_tensors(T=300, grad=True, heads=4)
    options = {"operator": operator, "decay": 0.9, "backend": device.backend}

    def f(q, k, v):
        return 3 * hla.scan(2 * q, torch.relu(k), v, scale=0.05, **options)

    compiled = torch.compile(f, fullgraph=True)
    o, want = compiled(q, k, v), f(q, k, v)
    bits(o.detach(), want.detach())
    bits(torch.autograd.grad(o, (q, k, v), do), torch.autograd.grad(want, (q, k, v), do))


@per_device(where=on_cuda)
def test_runs_where_the_arrays_are(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    q, k, v, _ = (x.to("cuda:1") for x in long_tensors(T=100))
    options = {"backend": device.backend}
    with torch.cuda.device(0):
        o = hla.scan(q, k, v, **options)
        assert torch.cuda.current_device() == 0
    assert o.device == q.device
    want = hla.scan(*(x.to("cuda:0") for x in (q, k, v)), **options)
    bits(o.to("cuda:0"), want)
    with pytest.raises(ValueError, match=r"\bk\b.*cuda:0"):
        hla.scan(q, k.to("cuda:0"), v, **options)


@per_device("operator", OPERATORS, where=on_cuda)
def test_memory(device, operator):
    """Beyond inputs, outputs and gradients, of whole sequences: three tensors of q's size."""
    q, k, v, do = long_tensors(T=2048, grad=True, heads=32)
    options = {"operator": operator, "decay": 0.9, "backend": device.backend}
    hla.scan(q, k, v, **options).backward(do)  # compiles, allocates gradients
    for x in (q, k, v):
        x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, size = torch.cuda.memory_allocated(), q.numel() * q.element_size()
    o = hla.scan(q, k, v, **options)
    gradients = torch.autograd.grad(o, (q, k, v), do)
    peak = torch.cuda.max_memory_allocated() - before
    results = sum(x.numel() * x.element_size() for x in (o, *gradients))
    assert peak - results <= 3 * size * (1 + 1e-3), f"{(peak - results) / size:.2f} of q"


@per_device(where=on_cuda)
def test_float32_is_not_tf32_unless_torch_says_so(device):
    inputs = inputs_of(500, D=128, V=128)
    arrays = device.arrays(inputs, "float32") | {"backend": device.backend}
    want = hla.scan(**inputs, scale=0.1)
    assert "reduced precision" not in hla.explain(**arrays).plan
    o = hla.scan(**arrays, scale=0.1)
    exact = errors(host(o), want)[0]
    assert exact <= budget("float32", D=128, T=500)[0]
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert "reduced precision" in hla.explain(**arrays).plan
        o = hla.scan(**arrays, scale=0.1)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    rough = errors(host(o), want)[0]
    assert 10 * exact < rough <= 3.5 * 2.1e-4  # hla2's three roundings, and its inputs are rounded
