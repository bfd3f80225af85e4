"""JAX on meshes of devices, what it compiles, symbolic sizes, and decays that cannot be read."""

import functools
import os
import subprocess
import sys
import textwrap

import literal
import numpy as np
import pytest
from conftest import OPERATORS, close, draw, environment, load, to_numpy

import hla


@pytest.fixture
def jax(quick_jax):
    return quick_jax


PREAMBLE = """
    import functools
    import numpy as np, jax, jax.numpy as jnp, hla
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    rng = np.random.default_rng(0)
    B, H, T, D, V = 2, 2, 9, 4, 3
    q, v = rng.standard_normal((B, H, T, D)), rng.standard_normal((B, H, T, V))
    k, decay = rng.standard_normal((B, 1, T, D)), np.linspace(0.5, 0.9, H)
    gate = -rng.random((B, H, T))

    def mesh(kind):
        return jax.make_mesh((2, 2), ("b", "h"), axis_types=(kind, kind))

    def same(got, want):
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            x, y = np.asarray(x), np.asarray(y)
            assert x.shape == y.shape
            assert abs(x - y).max() <= 1e-9 * abs(y).max()

    CASES = (
        {"operator": "ahla", "mask": "prefix", "form": "dense"},
        {"operator": "hla2", "form": "recurrent", "normalize": True, "ridge": 0.1},
        {"operator": "hla3", "form": "associative"},
        {"operator": "hla3", "convention": "paper"},
    )

    def everything(q, k, v, gate, state, form="chunked", **options):
        # a scan, its gradients by vjp and by grad, a step, a segment and its joins
        def scan(q, k, v, gate, state):
            return hla.scan(q, k, v, initial_state=state, return_state=True, form=form,
                            chunk_size=4, **gate, **options)

        def loss(*args):
            return sum((x**2).sum() for x in jax.tree.leaves(scan(*args)))

        out, pullback = hla.vjp(q, k, v, initial_state=state, return_state=True, form=form,
                                chunk_size=4, **gate, **options)
        found = [out, pullback(*out)[:3], scan(q, k, v, gate, state)]
        found.append(jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, gate, state))
        one = {n: x[..., 0] if n == "log_gate" else x for n, x in gate.items()}
        found.append(hla.step(q[..., 0, :], k[..., 0, :], v[..., 0, :], state, **one, **options))
        if options.get("convention") != "paper":
            names = {n: x for n, x in options.items() if n in ("operator", "mask")}
            segment = hla.summarize(q, k, v, **gate, **names)
            found += [segment, hla.combine(segment, segment)]
        return found
"""


def on_four_devices(code):
    """Run code after PREAMBLE in a process whose host is four devices for JAX."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PREAMBLE) + textwrap.dedent(code)],
        env=environment(XLA_FLAGS=flags, JAX_PLATFORMS="cpu"),
        check=True,
        timeout=240,
    )


def test_a_mesh_keeps_its_devices(jax):
    """Nor is anything else changed that JAX or NumPy owns; an array no one placed goes anywhere."""
    on_four_devices("""
        for kind in (AxisType.Auto, AxisType.Explicit):
            m = mesh(kind)
            x = jax.device_put(jnp.ones((2, 9, 4)), NamedSharding(m, P("b")))
            before = jax.config.values.copy(), np.geterr(), set(m.devices.flat)
            for _ in range(2):
                o, state = hla.scan(x, x, x, decay=jnp.full(2, 0.5), return_state=True)
                hla.step(x[:, 0], x[:, 0], x[:, 0], state)
                hla.vjp(x, x, x)[1](o)
                hla.explain(x, x, x)
                assert x.devices() == set(m.devices.flat) and len(x.devices()) == 4
            assert before == (jax.config.values, np.geterr(), set(m.devices.flat))
            assert o.sharding.spec[0] == "b"
        here, there = (jax.device_put(x, d) for d in jax.devices()[1:3])
        try:
            hla.scan(here, there, there)
        except ValueError as error:
            assert "k is on device" in str(error)
        else:
            raise AssertionError
    """)


@pytest.mark.aot
def test_shard_map(jax):
    """As without it, with JAX's checks of what varies; a gradient has the type of its input."""
    on_four_devices("""
        m = jax.make_mesh((2,), ("h",), axis_types=(AxisType.Auto,))
        heads = lambda x: P(None, "h") if np.shape(x)[1:2] == (H,) else P()

        def sharded(function, *args):
            want = jax.eval_shape(function, *args)
            specs = [jax.tree.map(heads, x) for x in (args, want)]
            return jax.shard_map(function, mesh=m, in_specs=specs[0], out_specs=specs[1])(*args)

        for options in CASES[1:]:  # those that have loops
            f = functools.partial(everything, **options)
            jax.eval_shape(functools.partial(sharded, f), q, q, v, {"log_gate": gate}, None)

        def pulled(q, k, v, gate, state):  # k is shared: its gradient is the sum over the devices
            out, pullback = hla.vjp(q, k, v, log_gate=gate, initial_state=state)
            return out, pullback(out)

        start = hla.scan(q, q, v, return_state=True)[1]
        args = jax.tree.map(jnp.asarray, (q, k, v, gate, start))
        same(jax.jit(functools.partial(sharded, pulled))(*args), pulled(*args))
    """)


def test_explicit_axes(jax):
    """Batch and head axes split by type; eager and jitted; shared and replicated operands."""
    on_four_devices("""
        m = mesh(AxisType.Explicit)

        def put(x):
            names = [n if s > 1 else None for n, s in zip("bh", np.shape(x))]
            return jax.device_put(x, NamedSharding(m, P(*names) if np.ndim(x) > 2 else P()))

        with jax.set_mesh(m):
            for i, options in enumerate(CASES):
                g = {"decay": decay} if i % 2 else {"log_gate": gate}
                f = functools.partial(everything, **options)
                jax.eval_shape(f, *jax.tree.map(put, (q, k, v, g)), None)
            jax.eval_shape(functools.partial(hla.scan, mask="none"), *map(put, (q, k, v)))

        def pulled(q, k, v, decay, state):
            out, pullback = hla.vjp(q, k, v, decay=decay, initial_state=state, return_state=True)
            return out, pullback(*out)

        start = hla.scan(q, k, v, decay=decay, return_state=True)[1]
        args = jax.tree.map(put, (q, k, v, decay, start))
        want = pulled(q, k, v, decay, start)  # on NumPy's arrays, of which XLA compiles nothing
        for way in (jax.jit(pulled), pulled):
            same(got := way(*args), want)
            assert jax.typeof(got[0][0]).sharding.spec[:2] == ("b", "h")
            for x, dx in zip(args[:3], got[1][:3]):
                assert jax.typeof(x).sharding.spec == jax.typeof(dx).sharding.spec
    """)


def shapes_of(jax, f, *args):
    return jax.eval_shape(f, *jax.tree.map(jax.numpy.asarray, args))


@pytest.mark.parametrize("operator", OPERATORS)
def test_nothing_relies_on_rank_promotion(jax, operator):
    """Every form, gate and function where keys, values and decay have fewer axes than queries."""
    q, k, v = draw(2, 3, 9)
    gates = {"decay": np.linspace(0.5, 0.9, 3)}, {"log_gate": -np.ones((3, 9))}

    def both(q, k, v, gate, mask, form):
        options = {"operator": operator, "mask": mask, "form": form, "chunk_size": 4}
        state = mask != "none"
        given = dict(gate)
        if state:
            token = q[..., 0, :], k[0], v[..., 0, :]
            start = hla.step(*token, operator=operator, mask=mask)[1]
            given |= {"initial_state": start, "return_state": True}
        out, pullback = hla.vjp(q, k, v, **options, **given)
        return pullback(*out) if state else pullback(out)

    def join(q, k, v, gate):
        segment = hla.summarize(q, k, v, operator=operator, **gate)
        return hla.combine(segment.to_state(), hla.combine(segment, segment))

    with jax.numpy_rank_promotion("raise"):
        for gate, forms in zip(
            gates, (("chunked", "dense"), ("recurrent", "associative")), strict=True
        ):
            shapes_of(jax, join, q, k[0, 0], v[0], gate)
            for form in forms:
                f = functools.partial(both, mask="causal", form=form)
                shapes_of(jax, f, q, k[0, 0], v[0], gate)
        shapes_of(jax, functools.partial(both, mask="none", form=None), q, k[0, 0], v[0], {})


def test_numbers_compile_nothing(jax):
    """Another scale, eps or ridge runs what is compiled, to the right values."""
    compiled = []

    def seen(event, *_, **__):
        compiled.append(event.endswith("backend_compile_duration"))

    inputs = draw(2, 5)
    given = load("jax").arrays(*inputs)
    jax.monitoring.register_event_duration_secs_listener(seen)
    counts = []
    for scale, eps, ridge in ((0.5, 1.0, 0.3), (2, 0.0, 0.1), (-0.7, 3, 2)):
        numbers = {"scale": scale, "eps": eps, "ridge": ridge, "normalize": True}
        want, pull = hla.vjp(*inputs, **numbers)
        got, pullback = hla.vjp(*given, **numbers)
        close(to_numpy(got), want)
        for x, y in zip(pullback(got)[:3], pull(want)[:3], strict=True):
            close(to_numpy(x), y)
        close(to_numpy(hla.scan(*given, form="associative", **numbers)), want)
        o, _ = hla.step(*(x[:, 0] for x in given), **numbers)
        close(to_numpy(o), want[:, 0])
        counts.append(sum(compiled))
    assert counts[0] > 0
    assert counts == counts[:1] * 3


@pytest.mark.parametrize(
    ("operator", "form", "kind"),
    [("hla2", "chunked", "decay"), ("linear", "chunked", "log_gate"), ("ahla", "dense", "decay")],
)
def test_symbolic_sizes(jax, operator, form, kind):
    """One exported program for every length and batch: from a state, and its gradients."""
    from jax import export

    options = {"operator": operator, "form": form, "return_state": True}

    def pulled(q, k, v, gate, state):
        out, pullback = hla.vjp(q, k, v, initial_state=state, **{kind: gate}, **options)
        return out, pullback(*out)

    def inputs(T, batch=3):
        q, k, v = draw(batch, 2, T)
        state = hla.scan(*draw(batch, 2, 3), **options)[1]
        return q, k, v, np.array([0.5, 0.9]) if kind == "decay" else -abs(v[..., 0]), state

    def symbols():
        array = functools.partial(jax.ShapeDtypeStruct, dtype=np.float64)
        b, t = export.symbolic_shape("b, t")
        *qkv, _, state = inputs(7)
        full = [array((b, 2, t, x.shape[-1])) for x in qkv]
        token = [array((b, 2, x.shape[-1])) for x in qkv]
        gate = array((2,) if kind == "decay" else (b, 2, t))
        return full, token, gate, jax.tree.map(lambda x: array((b, *x.shape[1:])), state)

    for _ in range(2 if operator == "hla2" else 1):  # symbols of two exports are not compared
        full, token, gate, state = symbols()
        exported = export.export(jax.jit(pulled))(*full, gate, state)
    for T in (1, 129) if operator == "hla2" else (5,):
        given = inputs(T, batch=2)
        got = exported.call(*jax.tree.map(jax.numpy.asarray, given))
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(pulled(*given)), strict=True):
            close(to_numpy(x), y)
    export.export(jax.jit(functools.partial(hla.step, operator=operator)))(*token, state)
    with pytest.raises(hla.Unsupported, match="associative"):
        export.export(jax.jit(functools.partial(hla.scan, form="associative")))(*full)


@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("linear", {"form": "recurrent"}),
        ("hla2", {}),
        ("hla2", {"convention": "paper"}),
        ("ahla", {"mask": "prefix"}),
        ("hla3", {"form": "dense"}),
    ],
)
def test_a_traced_decay_of_zero(jax, operator, options):
    """Its values cannot be read: the output, two derivatives and all gradients are the sum's."""
    T = 4
    q, k, v = draw(3, T, D=3)
    weight = draw(3, T, D=3, seed=1)[2]
    decay = np.array([0.0, 1e-310, 0.5])
    names = {n: x for n, x in options.items() if n in ("mask", "convention")}

    def truth(g):  # of each head: a polynomial in its decay
        paper = options.get("convention") == "paper"
        names = {"mask": options["mask"]} if "mask" in options else {}
        o = (literal.paper if paper else literal.scan)(q, k, v, operator=operator, decay=g, **names)
        return ((o[0] if paper else o) * weight).sum((1, 2))

    places = np.cos(np.linspace(0.1, np.pi - 0.1, 4 * T)) / 2 + 0.5
    values = np.stack([truth(g) for g in places])
    fitted = [np.polynomial.Polynomial.fit(places, x, 3 * T, domain=[0, 1]) for x in values.T]
    want, slope, bend = (
        np.array([p.deriv(n)(g) for p, g in zip(fitted, decay, strict=True)]) for n in range(3)
    )

    def heads(decay, q, k, v):
        o = hla.scan(q, k, v, operator=operator, decay=decay, chunk_size=3, **options)
        return (o * weight).sum((1, 2))

    def steps(decay, q, k, v):
        total, state = 0.0, None
        for t in range(T):
            token = (x[:, t] for x in (q, k, v))
            o, state = hla.step(*token, state, operator=operator, decay=decay, **names)
            total += (o * weight[:, t]).sum(-1)
        return total

    for f in (heads, steps) if not options else (heads,):

        def sums(*args, f=f):
            each = f(*args)
            return each.sum(), each

        slopes = jax.jit(jax.grad(sums, argnums=(0, 1, 2, 3), has_aux=True))
        grads, found = slopes(decay, q, k, v)
        close(to_numpy(found), want)
        close(to_numpy(grads[0]), slope, 1e-8)
        assert all(np.isfinite(to_numpy(x)).all() for x in grads)
        near, _ = slopes(decay + 1e-14, q, k, v)
        for x, y in zip(grads[1:], near[1:], strict=True):
            close(to_numpy(x), to_numpy(y), 1e-9)
    if not options:
        second = jax.jit(jax.hessian(lambda *args: heads(*args).sum()))(decay, q, k, v)
        close(np.diag(to_numpy(second)), bend, 1e-7)
    with pytest.raises(ValueError, match="decay"):
        hla.scan(*load("jax").arrays(q, k, v), decay=load("jax").array(decay * 0, "float64"))
