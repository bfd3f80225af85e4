"""Pallas: kernels lowered without their devices, their text in three arithmetics, traces."""

import functools
import importlib
import itertools
import math

import numpy as np
import pytest
from conftest import close, draw, installed, load, same, to_numpy
from test_jax import on_four_devices

import hla
from hla import backends
from hla.arguments import prepare

jax = installed("jax")
if why := backends.load("pallas").machine().reason:  # an older JAX
    pytest.skip(why, allow_module_level=True)
jnp, export = jax.numpy, importlib.import_module("jax.export")
sweep = installed("hla.kernels.pallas.sweep")
tpu = installed("hla.kernels.pallas.tpu")
weights = installed("hla.kernels.pallas.weights")
text = installed("hla.kernels.pallas.chunk")
Operands, Work, ROWS, W = sweep.Operands, text.Work, text.ROWS, text.W

BATCH, C = (2, 3), 5
PLAIN = Work(
    128, 128, reads=True, strict=False, reverse=False, gated=False, read=1.0, write=1.0,
    dots=False, period=0, start=False, end=False, dtype="bfloat16", out="bfloat16",
)  # fmt: skip
ALL = {"gated": True, "dots": True, "period": 4, "start": True, "end": True}
SMALL = {"D": 24, "V": 11, "out": "float32"}
WORK = {
    "plain": PLAIN,
    "written": PLAIN._replace(write=0.5, read=0.25, strict=True),
    "states alone": PLAIN._replace(reads=False, gated=True, end=True),
    "narrow": PLAIN._replace(**ALL, write=0.5),
    "narrow reverse": PLAIN._replace(**ALL, reverse=True, strict=True),
    "float16": PLAIN._replace(**SMALL | {"V": 100}, dtype="float16"),
    "float32": PLAIN._replace(**SMALL | ALL, dtype="float32"),
    "float32 reverse": PLAIN._replace(**SMALL | ALL, dtype="float32", reverse=True),
}


@pytest.fixture(autouse=True)
def quickly(quick_jax):
    """Compile what runs once with less care."""


def operands(p: Work, batch=BATCH, chunks=C, shared=False):
    """Operands of a launch; with ``shared`` keys are those of several heads."""
    rng = np.random.default_rng(3)
    T, few = chunks * W, (*batch[:-1], 1) if shared else batch

    def some(*shape, dtype=p.dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    gate = None
    if p.gated:
        a = -rng.random((*few, chunks, W))
        a[0, 0, 1, [0, 3, 4, W - 1]] = -math.inf
        gate = weights.vectors(jnp.asarray(a, "float32"), 2, strict=p.strict, reverse=p.reverse)
    return Operands(
        some(*batch, T, p.D) if p.reads else None,
        some(*few, T, p.D),
        some(*few, T, p.V),
        some(*batch, T, p.V) if p.dots else None,
        gate,
        some(*few, p.V, p.D, dtype="float32") if p.start else None,
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["written", "float32 reverse"])
def test_a_tpu_kernel_is_its_text_as_plain_jnp(name, shared):
    p, given = WORK[name], operands(WORK[name], shared=shared)
    got = jax.jit(lambda x: tpu.interpreted(p, BATCH, x))(given)
    want = jax.jit(lambda x: sweep.plain(p, BATCH, x))(given)
    for x, y in zip(got, want, strict=True):
        assert (x is None) == (y is None)
        if y is not None:
            assert x.dtype == y.dtype
            close(to_numpy(x), to_numpy(y), 1e-6 if x.dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize("name", ["narrow"])
def test_a_tpu_kernel_has_no_races(name, capfd):
    p = WORK[name]
    params = tpu.pltpu.InterpretParams(detect_races=True)
    found = tpu.tpu(p, (1, 2), operands(p, (1, 2), 2), interpret=params)
    want = tpu.interpreted(p, (1, 2), operands(p, (1, 2), 2))
    jax.block_until_ready(found)
    assert "RACE" not in capfd.readouterr().out
    for x, y in zip(found, want, strict=True):
        close(to_numpy(x), to_numpy(y), 1e-2)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
@pytest.mark.parametrize("order", [(2, 0, 1), (1, 0, 2), (0, 1, 2)])
@pytest.mark.parametrize("name", WORK)
def test_a_gpu_kernel_is_its_text_as_plain_jnp(name, order, monkeypatch):
    """Values on the host, whichever of its warpgroups goes first."""
    installed("absl")
    from mosaic_interpreter import interpreted

    mosaic, p = installed("hla.kernels.pallas.mosaic"), WORK[name]
    given = operands(p, chunks=3)
    want = sweep.plain(p, BATCH, given)
    with interpreted(monkeypatch, order):
        monkeypatch.setattr(mosaic, "_kernel", mosaic._kernel.__wrapped__)
        found = mosaic.cuda(p, BATCH, jax.tree.map(np.asarray, given))
    for field, x, y in zip(want._fields, found, want, strict=True):
        if y is not None:
            x, y = to_numpy(x), to_numpy(y)
            x = x.sum(-3, keepdims=True) if field == "sums" else x
            assert x.shape == y.shape
            close(x, y, 4e-3 if field == "o" and p.out == "bfloat16" else 1e-5)


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_every_kernel_lowers_without_its_device(name, platform):
    run = tpu.tpu
    if platform == "cuda":
        installed("absl")
        run = installed("hla.kernels.pallas.mosaic").cuda
    p = WORK[name]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands(p))
    exported = lowered(lambda x: run(p, BATCH, x), [platform], shapes)
    assert ("mosaic_gpu" if platform == "cuda" else "tpu_custom_call") in exported.mlir_module()


def test_a_gpu_kernel_is_that_of_other_factors_and_of_a_strict_pass():
    """Launches of one shape class are lowered and compiled once."""
    installed("absl")
    run, given = installed("hla.kernels.pallas.mosaic").cuda, operands(WORK["narrow"])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)
    works = WORK["narrow"], WORK["narrow"]._replace(read=0.5, write=1.0, strict=True)
    exported = lowered(lambda x: [run(p, BATCH, x) for p in works], ["cuda"], shapes)
    assert exported.mlir_module().count("@mosaic_gpu_v2") == 1


def lowered(function, platforms, *given):
    """A program for platforms that need not be here; Mosaic's calls make no promise for later."""
    checks = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    return export.export(jax.jit(function), platforms=platforms, disabled_checks=checks)(*given)


def test_weights_keep_their_digits_whatever_the_gate():
    """Differences of sums over resets, steep and gentle gates; those of a decay of 1 are 1."""
    rng = np.random.default_rng(0)
    a = -rng.random((4, W)).astype(np.float32) * np.float32([[0.01], [0.3], [5.0], [0.3]])
    a[1, [0, 9, 40]] = -math.inf
    a[2, 20] = -1e30
    a[3, 30] = math.nan
    for strict, reverse, power in itertools.product((False, True), (False, True), (1, 3)):
        x = to_numpy(weights.vectors(jnp.asarray(a), power, strict=strict, reverse=reverse))
        assert x.shape == (4, ROWS, W)
        exact = np.maximum(power * a.astype(np.float64), -1e4)
        c = np.cumsum(exact, -1)
        up = c - exact if strict else c
        span = x[:, 0][:, None, :] + x[:, 1][:, :, None]
        span += x[:, 2][:, None, :] + x[:, 3][:, :, None]  # [key, query]
        span = span.mT if reverse else span
        want = up[:, None, :] - c[:, :, None]
        legal = np.triu(np.ones((W, W)), 1 if strict else 0) > 0
        rows = slice(0, 3)
        close(np.exp(span[rows][:, legal]), np.exp(want[rows][:, legal]), 2e-6)
        before, after = np.exp(up), np.exp(c[:, -1:] - c)
        first, second = (after, before) if reverse else (before, after)
        close(x[rows, 4], first[rows], 2e-6)
        close(x[rows, 5], second[rows], 2e-6)
        close(x[rows, 6], np.broadcast_to(np.exp(c[rows, -1:]), (3, W)), 2e-6)
        assert np.isnan(x[3, 6]).all()
    ones = to_numpy(weights.vectors(jnp.zeros(W), 3, strict=False, reverse=False))
    same(ones[4:], np.ones((ROWS - 4, W)))


@pytest.mark.parametrize("gate", ["decay", pytest.param("log_gate", marks=pytest.mark.aot)])
def test_segments_are_the_whole(gate):
    """A segment is a batch entry of a launch, the last one short; gradients too."""
    q, k, v, a = (x[:1] for x in arrays(600))
    gates = {"log_gate": a * 0.02} if gate == "log_gate" else {"decay": jnp.asarray([0.99])}
    *_, start = hla.scan(q[:, :9], k[:, :9], v[:, :9], decay=0.9, return_state=True)
    options = {"scale": 0.1, "return_state": True, "initial_state": start, "gradient": True}
    request, inputs, _ = prepare(q, k, v, **gates, **options)
    run = installed("hla.kernels.pallas.run").runner("plain")

    @functools.partial(jax.jit, static_argnums=1)
    def everything(inputs, tokens):
        o, state, saved = run.forward(request, inputs, tokens)
        return o, state, run.backward(request, inputs, saved, o, state, tokens)

    for x, y in zip(*(jax.tree.leaves(everything(inputs, n)) for n in (256, 0)), strict=True):
        close(to_numpy(x), to_numpy(y), 1e-5)


def call(q, k, v, log_gate):
    return hla.scan(q, k, v, log_gate=log_gate, scale=0.25, backend="pallas")


def loss(*given):
    return jnp.sum(call(*given) ** 2)


def arrays(T=70):
    lib = load("jax")
    gate = -np.random.default_rng(0).random((2, T))
    return tuple(lib.array(x, "float32") for x in (*draw(2, T, D=24, V=11), gate))


def test_one_program_serves_the_host_a_gpu_and_a_tpu():
    """With gradients; what a trace does not know is chosen where it is lowered."""
    installed("absl")
    given, both = arrays(), jax.value_and_grad(loss, argnums=(0, 3))
    program = lowered(both, ["cpu", "cuda", "tpu"], *given)
    for kernel in ("mosaic_gpu", "tpu_custom_call"):
        assert kernel in program.mlir_module()
    value, slopes = program.call(*given)
    *wide, gate = map(to_numpy, given)
    o, pull = hla.vjp(*wide, log_gate=gate, scale=0.25, backend="array_api")
    want = pull(2 * o)
    for x, y in zip((value, *slopes), (np.sum(o**2), want.dq, want.dlog_gate), strict=True):
        close(to_numpy(x), y, 1e-5)


def test_a_stored_program_of_the_host_and_a_gpu_runs():
    """Steps too, where a state is updated in its place."""
    installed("absl")
    installed("flatbuffers")
    x = jnp.asarray(draw(2, 1, D=64, V=64)[0][:, 0], "bfloat16")

    def three(x):
        state = hla.step(x, x, x, backend="pallas")[1]
        again = functools.partial(hla.step, x, x, x, backend="pallas", donate=True)
        state, o = jax.lax.scan(lambda s, _: again(s)[::-1], state, length=2)
        return o, *state

    stored = lowered(three, ["cpu", "cuda"], x).serialize()
    program = export.deserialize(stored)
    assert "output_operand_alias" in program.mlir_module()
    for y, z in zip(program.call(x), three(x), strict=True):
        close(to_numpy(y), to_numpy(z), 1e-5)


def test_a_trace_where_a_hopper_gpu_is_takes_its_kernels_there_alone(monkeypatch):
    """With backend=None; not where the accelerator is a TPU, another card, or several kinds."""
    installed("absl")
    module, x = importlib.import_module("hla.backends.pallas"), jnp.ones((3, 71, 64), "bfloat16")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def programs(*kinds):
        found = {f"cuda:{i}": kind for i, kind in enumerate(kinds)} | {"TFRT_CPU_0": ""}
        monkeypatch.setattr(module, "_platforms", lambda: found)
        traced = jax.jit(lambda x: hla.scan(x, x, x)).trace(x)
        texts = (traced.lower(lowering_platforms=(n,)).as_text() for n in ("cpu", "cuda"))
        return ["mosaic_gpu" in text for text in texts]

    assert programs("cuda") == [False, True]
    assert hla.explain(x, x, x).backend == "array_api"  # on the host
    told = []
    jax.eval_shape(lambda x: told.append(hla.explain(x, x, x)), x)
    assert told[0].backend == "pallas"
    assert "hla2 by two state owners" in told[0].plan
    assert "lowered for the host" in told[0].plan
    state = hla.scan(x, x, x, return_state=True)[1]
    for donate in (False, True):
        step = jax.jit(lambda x, s, own=donate: hla.step(x, x, x, s, donate=own))
        text = step.trace(x[:, 0], state).lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text
        assert text.count("operand_tuple_indices") == 3 * donate  # S, F and eta where they lie
    with pytest.warns(hla.SlowPathWarning):
        assert programs("cuda", "") == programs("tpu") == [False, False]
    monkeypatch.delenv("HLA_PALLAS_INTERPRET")
    with pytest.warns(hla.SlowPathWarning, match=r"compute capability 9\.0"):
        assert programs("") == [False, False]


def test_transforms_are_those_of_the_generic_code():
    """A scan over layers with checkpoints, of heads along an axis that vmap adds."""
    q, k, *_ = arrays(9)

    def layers(q, backend):
        def layer(x, _):
            o = jax.checkpoint(lambda x: hla.scan(x, k, k, backend=backend))(x)
            return o / 9, None

        run = jax.vmap(lambda x: jax.lax.scan(layer, x, length=2)[0], in_axes=1, out_axes=1)
        return jnp.sum(run(jnp.stack([q, 2 * q], 1)) ** 2)

    got, want = (jax.grad(layers)(q, backend) for backend in ("pallas", "array_api"))
    close(to_numpy(got), to_numpy(want), 1e-5)


def test_a_mesh_of_devices_lowers():
    """Heads over devices by shard_map, which asks along which axes results vary; with gradients."""
    installed("absl")
    q, k, v, _ = arrays(9)
    mesh = jax.make_mesh((1,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    heads = jax.sharding.PartitionSpec("heads")
    own = jax.shard_map(
        lambda q, k, v: hla.scan(q, k, v, backend="pallas"),
        mesh=mesh, in_specs=heads, out_specs=heads,
    )  # fmt: skip
    for platform in ("cuda", "tpu"):
        traced = jax.jit(jax.grad(lambda q: jnp.sum(own(q, k, v)))).trace(q)
        assert "custom_call" in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("check", [True, False])
def test_kernels_of_warpgroups_lower_on_a_mesh(check):
    """A sweep's gradients and a token's step, which replace arrays, by shard_map as well."""
    installed("absl")
    x = jnp.ones((2, 9, 64), "bfloat16")
    token = hla.scan(x, x, x, backend="array_api", return_state=True)[1]
    mesh = jax.make_mesh((1,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    heads = jax.sharding.PartitionSpec("heads")
    split = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=heads, out_specs=heads, check_vma=check
    )
    own = split(lambda x: hla.scan(x, x, x, backend="pallas"))
    steps = [
        split(lambda x, s, n=n: hla.step(x, x, x, s, backend="pallas", donate=n))
        for n in (False, True)
    ]
    calls = [(jax.grad(lambda x: jnp.sum(own(x).astype("float32"))), x)]
    calls += [(step, x[:, 0], token) for step in steps]
    for call, *given in calls:
        text = jax.jit(call).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text


@pytest.mark.aot
def test_a_batch_is_split_by_a_mesh():
    """Each device does its part, by the partitioner or by types; what is shared is summed."""
    on_four_devices("""
        import hla.backends.pallas as adapter
        adapter._platform = lambda request: "plain"
        q, k, v, decay = (jnp.asarray(x, "float32") for x in (q, k, v, decay))
        start = hla.scan(q, k, v, scale=0.3, return_state=True)[1]
        given = q, k, v, decay, start

        def pulled(q, k, v, decay, state, backend="pallas"):
            more = {"initial_state": state, "return_state": True, "backend": backend}
            out, pullback = hla.vjp(q, k, v, decay=decay, scale=0.3, **more)
            slope = jax.grad(lambda v: hla.scan(q, k, v, backend=backend).sum())
            return out, pullback(*out), slope(v)

        want = jax.jit(functools.partial(pulled, backend="array_api"))(*given)
        for kind in (AxisType.Auto, AxisType.Explicit):
            def put(x):
                names = [n if s > 1 else None for n, s in zip("bh", x.shape)]
                names = P(*names) if x.ndim == 4 else P()
                return jax.device_put(x, NamedSharding(mesh(kind), names))

            own = jax.tree.map(put, given)
            run = jax.jit(pulled).lower(*own).compile()
            found = run(*own)
            for x, y in zip(*map(jax.tree.leaves, (found, want)), strict=True):
                assert abs(np.asarray(x) - y).max() <= 1e-5 * abs(y).max()
            assert found[0][0].sharding.spec[:2] == ("b", "h")
            assert "all-gather(" not in run.as_text()
    """)


@pytest.mark.parametrize("operator", ["hla2", "ahla"])
def test_tokens_before_heads_are_read_where_they_lie(operator):
    """Under a trace fused kernels take [B, T, H, D] as given: transposes meet the caller's."""
    installed("absl")
    x = jax.ShapeDtypeStruct((2, 70, 4, 128), "bfloat16")

    def run(q, k, v, do):
        call = functools.partial(hla.scan, operator=operator, axis=-3, backend="pallas")
        o, pulled = jax.vjp(call, q, k, v)
        return o, pulled(do)

    text = jax.jit(run).trace(x, x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    kernels = [line for line in text.splitlines() if "mosaic_gpu" in line]
    # dq is written where dy (du) lies, the last array of the last kernel but its zero
    assert ["operand_index = 4" in x for x in kernels] == [False, False, True]
    rows = "tensor<2x72x4x128xbf16>"  # rows come in eights
    # q, k, v to o, y (u); these, do and y to dy, dv, dk; k, v, do, y, dy to dq
    assert [x.count(rows) for x in kernels] == [5, 8, 6]
    assert not any("2x4x72x128" in x for x in kernels)


def test_a_step_for_a_gpu_here(monkeypatch):
    """Its kernels are compiled side by side, and sums between them are written out.

    XLA orders a reduction by the shape of all heads: the bits of one would depend on the others.
    """
    installed("absl")
    beside, lowering = (installed(f"hla.kernels.pallas.{x}") for x in ("beside", "lowering"))
    begun = []
    monkeypatch.setattr(lowering, "_hopper", lambda: "card")
    monkeypatch.setattr(beside, "_compile", lambda x, on: begun.append((x["kernel_hash"], on)))
    monkeypatch.setattr(beside, "_begun", {})
    x, g = jax.ShapeDtypeStruct((2, 70, 64), "bfloat16"), jax.ShapeDtypeStruct((2,), "float32")

    def run(q, k, v, g, do):
        o, pulled = jax.vjp(lambda *x: hla.scan(*x[:3], decay=x[3], backend="pallas"), q, k, v, g)
        return o, pulled(do)

    text = jax.jit(run).trace(x, x, x, g, x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == len(set(begun)) == len(begun) == 3
    assert {device for _, device in begun} == {"card"}
    assert not any(name in text for name in ("stablehlo.reduce", "chlo.scan"))
    ordered = importlib.import_module("hla.kernels.pallas.ordered").ordered
    x = np.arange(1, 8, dtype=np.float32).reshape(1, 7)
    close(to_numpy(ordered.sum(x, (0, 1))), x.sum(), 0)
    close(to_numpy(ordered.cumulative_sum(x)), x.cumsum(1), 0)


def test_a_symbol_for_a_size_is_refused():
    T = export.symbolic_shape("T")[0]
    given = jax.ShapeDtypeStruct((2, T, 8), "float32")
    with pytest.raises(hla.Unsupported, match="symbols for sizes"):
        lowered(lambda x: hla.scan(x, x, x, backend="pallas"), ["cpu"], given)


def test_what_is_missing_is_the_reason(monkeypatch):
    """An older JAX, no device of the kernels, Mosaic GPU without what it imports."""
    module = importlib.import_module("hla.backends.pallas")
    monkeypatch.delenv("HLA_PALLAS_INTERPRET")
    monkeypatch.setattr(module, "_platforms", lambda: {"TFRT_CPU_0": ""})
    assert "compute capability 9.0" in module.machine().reason
    monkeypatch.setattr(module, "_platforms", lambda: {"cuda:0": "cuda"})
    monkeypatch.setattr(module, "_mosaic", lambda: False)
    assert "absl-py" in module.machine().reason
    module._missing.cache_clear()
    monkeypatch.setattr(module.metadata, "version", lambda name: "0.9.1")
    assert "0.10.2 or newer" in module.machine().reason
    monkeypatch.undo()
    module._missing.cache_clear()
    card = type("Device", (), {"platform": "gpu", "compute_capability": "10.0"})
    assert module._kernels(card) == ""
    card.compute_capability = "9.0"
    assert module._kernels(card) == "cuda"
