"""torch.func and JAX transformations: jit, vmap, grad, scan; graphs that do not grow."""

import functools
import itertools
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from conftest import (
    FORMS,
    OPERATORS,
    close,
    draw,
    environment,
    gates,
    installed,
    load,
    symmetric,
    to_numpy,
    usable,
)

import hla
from hla.libraries import library_of


@pytest.mark.parametrize("operator", OPERATORS)
def test_torch_func(operator):
    """torch.func: vmap over scan, and grad of each batch entry, equal the batched call."""
    torch = installed("torch")
    q, k, v = load("torch").arrays(*draw(3, 9))
    f = functools.partial(hla.scan, operator=operator, decay=0.9, chunk_size=4)
    close(to_numpy(torch.func.vmap(f)(q, k, v)), to_numpy(f(q, k, v)), 1e-12)
    gradient = torch.func.grad(lambda q, k, v: (f(q, k, v) ** 2).sum(), argnums=(0, 1, 2))
    each = torch.func.vmap(gradient)(q, k, v)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    (f(*leaves) ** 2).sum().backward()
    for x, y in zip(each, leaves, strict=True):
        close(to_numpy(x), to_numpy(y.grad), 1e-12)


def gradients(arguments, options, do):
    """Truth: what NumPy's hla.vjp in float64 gives for every argument, by its name."""
    given = {n: np.asarray(x) for n, x in arguments.items() if " " not in n}
    fields = [np.asarray(x) for n, x in arguments.items() if " " in n]
    start = options["kind"](*fields)
    names = {n: x for n, x in options.items() if n != "kind"}
    _, pullback = hla.vjp(**given, **names, initial_state=start)
    found = pullback(np.asarray(do))._asdict()
    state = found.pop("dinitial_state")._asdict()
    return {n: found[f"d{n}"] for n in given} | {f"state {n}": x for n, x in state.items()}


@pytest.mark.parametrize(
    ("operator", "form", "gate", "axis"),
    [
        ("linear", "recurrent", "decay", -2),
        ("hla2", "associative", "log_gate", -3),
        ("ahla", "chunked", "per_head", -3),
        ("hla3", "dense", "log_gate", -2),
    ],
)
def test_torch_func_of_every_argument(operator, form, gate, axis):
    """Each transform of each argument alone, the others closed over; on the host and nested."""
    torch = installed("torch")
    grad, vmap = torch.func.grad, torch.func.vmap
    H, T = 2, 3
    inputs = dict(zip("qkv", draw(H, T, D=2, V=1), strict=True))
    inputs |= {n: np.asarray(x) for n, x in gates(gate, H, T).items()}
    if axis == -3:
        inputs |= {n: inputs[n].swapaxes(0, 1).copy() for n in inputs if n != "decay"}
    _, start = hla.scan(*draw(H, 4, D=2, V=1), operator=operator, decay=0.9, return_state=True)
    inputs |= {f"state {n}": x for n, x in start._asdict().items()}
    options = {"operator": operator, "axis": axis, "kind": type(start)}
    do = np.random.default_rng(1).standard_normal(inputs["v"].shape)
    want = gradients(inputs, options, do)
    given = {n: torch.tensor(x) for n, x in inputs.items()}
    weights = torch.tensor(do)

    for name, x in given.items():

        def f(x, name=name):
            whole = given | {name: x}
            state = type(start)(*(whole.pop(n) for n in given if " " in n))
            return hla.scan(
                **whole, operator=operator, axis=axis, form=form, chunk_size=2, initial_state=state
            )

        def loss(x, f=f):
            return (f(x) * weights).sum()

        first, along = torch.tensor(want[name]), torch.ones_like(x) / 3
        bound = 1e-9 * float(abs(first).max() + abs(f(x)).max())

        def agree(got, want, bound=bound):
            torch.testing.assert_close(got, want, rtol=0, atol=bound)

        def is_first(got, name=name, first=first):
            agree(symmetric(name[-1], got), symmetric(name[-1], first))

        is_first(torch.func.vjp(f, x)[1](weights)[0])
        is_first(torch.func.jacrev(loss)(x))
        is_first(torch.func.jacfwd(loss)(x))
        agree(torch.func.jvp(loss, (x,), (along,))[1], (first * along).sum(), 10 * bound)
        scaled = torch.stack([x, 0.9 * x], dim=-1)
        both = [0.9**i * x for i in range(2)]
        agree(vmap(f, in_dims=-1)(scaled), torch.stack([f(y) for y in both]))
        is_first(vmap(grad(loss), in_dims=-1)(scaled)[0])
        mapped = grad(lambda xs, f=f: (vmap(f, in_dims=-1)(xs) * weights).sum())
        is_first(mapped(scaled)[..., 0])
        leaf = x.clone().requires_grad_()
        none = 0 * leaf.square().sum()  # a denominator has no slope here, some are constant
        (slope,) = torch.autograd.grad(loss(leaf) + none, leaf, create_graph=True)
        (second,) = torch.autograd.grad((slope * along).sum() + none, leaf)
        curved = torch.func.hessian(loss)(x).reshape(x.numel(), -1) @ along.reshape(-1)
        agree(curved.reshape(x.shape), second, 100 * bound)


def test_torch_func_reads_what_is_closed_over():
    """A decay or gate on the host that no transform maps is checked, and may be a parameter."""
    torch = installed("torch")
    q, k, v = load("torch").arrays(*draw(2, 5))
    decay = torch.nn.Parameter(torch.tensor([0.5, 1.0]))
    for given in ({"decay": decay}, {"log_gate": -torch.rand(2, 5, dtype=torch.float64)}):
        found = torch.func.grad(lambda q, given=given: hla.scan(q, k, v, **given).sum())(q)
        leaf = q.clone().requires_grad_()
        hla.scan(leaf, k, v, **given).sum().backward()
        close(to_numpy(found.detach()), to_numpy(leaf.grad), 1e-12)
    for wrong in ({"decay": decay.detach() * 2}, {"log_gate": torch.ones(2, 5)}):
        for transform in (torch.func.grad, torch.func.hessian, torch.func.vmap):
            with pytest.raises(ValueError, match="holds"):
                transform(lambda q, wrong=wrong: hla.scan(q, k, v, **wrong).sum())(q)


@pytest.mark.parametrize("operator", ["hla2", "hla3"])
def test_torch_meta_tensors_have_shapes_alone(operator):
    torch = installed("torch")

    def everything(device):
        q, k, v = (torch.ones(2, 7, n, dtype=torch.bfloat16, device=device) for n in (4, 4, 3))
        decay = torch.full((2,), 0.9, device=device)
        options = {"operator": operator, "decay": decay}
        state = hla.scan(q, k, v, return_state=True, **options)[1]
        step = hla.step(q[:, 0], k[:, 0], v[:, 0], state, normalize=True, **options)
        (o, end), pullback = hla.vjp(
            q, k, v, initial_state=state, return_state=True, normalize=True, **options
        )
        segment = hla.summarize(q, k, v, **options)
        joined = hla.combine(segment, segment), hla.combine(state, segment)
        leaf = q.clone().requires_grad_()
        log_gate = torch.full((2, 7), -0.1, dtype=q.dtype, device=device)
        for form in ("chunked", "recurrent", "associative", "dense"):
            hla.scan(leaf, k, v, operator=operator, log_gate=log_gate, form=form).sum().backward()
        return torch.utils._pytree.tree_leaves(
            (o, end, step, pullback(o, end), segment, joined, leaf.grad)
        )

    for x, y in zip(everything("meta"), everything("cpu"), strict=True):
        if y is not None:
            assert (x.shape, x.dtype, x.device.type) == (y.shape, y.dtype, "meta")


def test_torch_layouts_and_tensors_that_need_gradients():
    torch = installed("torch")
    q, k, v = load("torch").arrays(*draw(2, 9))
    want = hla.scan(q, k, v)
    close(to_numpy(hla.scan(q.mT.contiguous().mT, k, v.expand(2, 9, 3))), to_numpy(want), 1e-12)
    q.requires_grad_()
    _, state = hla.scan(q, k, v, return_state=True)
    assert all(isinstance(x, torch.Tensor) for x in state)
    o, _ = hla.step(q[:, 0], k[:, 0], v[:, 0], state)
    o.sum().backward()
    assert q.grad is not None


@pytest.fixture
def jax(quick_jax):
    return quick_jax


def test_jax_transformations(jax):
    """jit, vmap over a batch axis anywhere, and grad, with a state going in and out."""
    lib = load("jax")
    inputs = draw(3, 9)
    q, k, v = lib.arrays(*inputs)
    want, end = hla.scan(*inputs, decay=0.9, return_state=True)

    @jax.jit
    def f(q, k, v, decay):
        return hla.scan(q, k, v, decay=decay, chunk_size=4, return_state=True)

    o, state = f(q, k, v, 0.9)
    close(to_numpy(o), want)
    assert type(state).__name__ == type(end).__name__
    o, state = jax.vmap(f, in_axes=(0, 0, 1, None))(q, k, v.swapaxes(0, 1), 0.9)
    close(to_numpy(o), want)
    for x, y in zip(state, end, strict=True):
        close(to_numpy(x), y)
    loss = jax.jit(jax.grad(lambda q: hla.scan(q, k, v, decay=0.9).sum()))
    close(to_numpy(loss(q)), hla.vjp(*inputs, decay=0.9)[1](np.ones((3, 9, 3))).dq)


@pytest.mark.parametrize("operator", ["hla2", "hla3"])
def test_jax_scan_over_steps(jax, operator):
    """The state is a pytree of one type and shape, so lax.scan carries it; packed states too."""
    inputs = draw(2, 9)
    arrays = load("jax").arrays(*(x.swapaxes(0, 1) for x in inputs))
    f = functools.partial(hla.step, operator=operator, decay=0.9)
    empty = hla.scan(
        *(x[:, :0] for x in load("jax").arrays(*inputs)), operator=operator, return_state=True
    )[1]

    def body(state, x):
        return f(*x, state)[::-1]

    want, end = hla.scan(*inputs, operator=operator, decay=0.9, return_state=True)
    state, o = jax.jit(lambda s, x: jax.lax.scan(body, s, x))(empty, arrays)
    close(to_numpy(o).swapaxes(0, 1), want)
    for x, y in zip(state, end, strict=True):
        close(to_numpy(x), y)
    _, o = jax.lax.scan(body, empty.pack(), arrays)
    close(to_numpy(o).swapaxes(0, 1), want)


def test_packed_states_are_differentiated_as_they_are_given(jax):
    """Autograd, torch.func and jax.grad through packed states: what hla.vjp gives."""
    torch = installed("torch")
    inputs = draw(2, 9)
    options = {"decay": 0.9, "return_state": True}
    start = hla.scan(*inputs, **options)[1].pack()
    (o, end), pullback = hla.vjp(*inputs, initial_state=start, **options)
    want = pullback(o, end).dinitial_state

    def loss(q, k, v, state):
        o, end = hla.scan(q, k, v, initial_state=state, **options)
        assert type(end) is type(start)
        return sum((x**2).sum() for x in (o, *end)) / 2

    lib = load("torch")
    leaves = type(start)(*(x.requires_grad_() for x in lib.arrays(*start)))
    loss(*lib.arrays(*inputs), leaves).backward()
    by_func = torch.func.grad(loss, argnums=3)(
        *lib.arrays(*inputs), type(start)(*lib.arrays(*start))
    )
    lib = load("jax")
    by_jax = jax.jit(jax.grad(loss, argnums=3))(
        *lib.arrays(*inputs), type(start)(*lib.arrays(*start))
    )
    assert type(by_func) is type(by_jax) is type(start)
    for x, y, z, g in zip(leaves, by_func, by_jax, want, strict=True):
        for found in (x.grad, y.detach(), z):
            close(to_numpy(found), g, 1e-12)


def test_torch_compiles_what_takes_packed_states():
    """scan, step and combine in one graph, and packing itself; gradients too."""
    torch = installed("torch")
    q, k, v = load("torch").arrays(*draw(2, 9))
    _, start = hla.scan(q, k, v, return_state=True)
    later = hla.summarize(q, k, v, decay=0.9)

    def f(q, packed, later):
        _, packed = hla.scan(q, k, v, initial_state=packed, return_state=True)
        o, packed = hla.step(q[:, 0], k[:, 0], v[:, 0], packed)
        return o, hla.combine(packed, later).unpack().pack()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    found = []
    for call in (f, compiled):
        leaf = q.clone().requires_grad_()
        o, end = call(leaf, start.pack(), later)
        assert type(end) is type(start.pack())
        (o.sum() + sum(x.sum() for x in end)).backward()
        found.append((o.detach(), *(x.detach() for x in end), leaf.grad))
    for x, y in zip(*found, strict=True):
        close(to_numpy(y), to_numpy(x), 1e-12)


def test_packing_copies_constants_from_the_host_once(monkeypatch):
    """As a CUDA graph needs, which is captured after one run; what a trace makes is not kept."""
    torch = installed("torch")
    _, state = hla.scan(*load("torch").arrays(*draw(2, 9)), return_state=True)
    library = library_of(state.S)
    monkeypatch.setattr(library, "_kept", {})
    monkeypatch.setattr(library, "_placed", {})
    torch.func.vmap(lambda S: state._replace(S=S).pack().unpack().S)(state.S)
    torch.func.grad(lambda S: state._replace(S=S).pack().unpack().S.sum())(state.S)
    with torch.inference_mode():
        state.pack().unpack()

    def copied(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(library.xp, "asarray", copied)
    S = state.S.clone().requires_grad_()
    state._replace(S=S).pack().unpack().S.sum().backward()
    close(to_numpy(S.grad[0]), np.triu(np.full((5, 5), 2.0)) - np.eye(5))


def equations(jaxpr):
    """The number of equations of a jaxpr, those of its inner ones included."""
    found = 0
    for eqn in jaxpr.eqns:
        found += 1
        for value in eqn.params.values():
            for x in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(x, "jaxpr", x)
                if hasattr(inner, "eqns"):
                    found += equations(inner)
    return found


def test_jaxpr_counter_sees_inner_loops(jax):
    def body(x, _):
        return x + 1 + 2 + 3, None

    loop = jax.make_jaxpr(lambda x: jax.lax.scan(body, x, length=3))(0.0)
    assert equations(loop.jaxpr) >= 4


@pytest.mark.parametrize("operator", OPERATORS)
def test_jax_graphs_do_not_grow_with_the_sequence(jax, operator):
    """Chunked and recurrent: one graph for any T, backwards too; associative: log T."""

    def size(T, form, gradient=False):
        x = jax.ShapeDtypeStruct((T, 8), np.float32)
        a = jax.ShapeDtypeStruct((T,), np.float32)

        def f(q, k, v, a):
            return hla.scan(q, k, v, log_gate=a, operator=operator, form=form, chunk_size=16)

        def g(*args):
            return jax.grad(lambda *args: f(*args).sum())(*args)

        return equations(jax.make_jaxpr(g if gradient else f)(x, x, x, a).jaxpr)

    for form in ("chunked", "recurrent"):
        assert size(512, form) == size(2048, form)
        assert size(512, form, gradient=True) == size(2048, form, gradient=True)
    small, middle, large = (size(T, "associative") for T in (64, 256, 1024))
    assert large - middle <= 1.2 * (middle - small) + 50


def test_jax_tracers_skip_value_checks(jax):
    """Under jit only shapes are checked: a bad decay is not an error there, a bad shape is."""
    q, k, v = load("jax").arrays(*draw(2, 9))
    f = jax.jit(lambda decay: hla.scan(q, k, v, decay=decay))
    assert f(np.float64(1.5)).shape == (2, 9, 3)
    with pytest.raises(ValueError, match="decay"):
        f(np.ones(9))


def test_jax_hands_no_tracer_to_another_library(jax):
    """A traced gate, state or cotangent counts as a traced q does: the named backend refuses."""
    if not usable(next(x for x in hla.available() if x.name == "triton")):
        pytest.skip("Triton is not here")
    q, k, v = load("jax").arrays(*draw(2, 9), dtype="float32")
    decay, log_gate = load("jax").arrays(np.full(2, 0.9), np.full((2, 9), -0.1), dtype="float32")
    (o, state), pullback = hla.vjp(q, k, v, return_state=True, backend="triton")

    def scan(**given):
        return hla.scan(q, k, v, **given, backend="triton")

    for name, x in (("decay", decay), ("log_gate", log_gate), ("initial_state", state)):
        with pytest.raises(hla.Unsupported, match="traced JAX array"):
            jax.jit(lambda x, name=name: scan(**{name: x}))(x)
        with pytest.raises(hla.Unsupported, match="traced JAX array"):
            jax.grad(lambda x, name=name: scan(**{name: x}).sum())(x)
    with pytest.raises(hla.Unsupported, match="traced JAX array"):
        jax.jit(lambda s: hla.step(q[:, 0], k[:, 0], v[:, 0], s, backend="triton"))(state)
    for given in ((o, None), (None, state)):
        with pytest.raises(hla.Unsupported, match="traced JAX array"):
            jax.jit(pullback)(*given)
    fallen = jax.jit(lambda d: hla.scan(q, k, v, decay=d, backend=["triton", "array_api"]))(decay)
    close(to_numpy(fallen), to_numpy(scan(decay=decay)), 1e-5)


def test_jax_without_x64():
    """JAX as it comes: float32 throughout, and nothing asks for a float64 that it would not get."""
    code = """
        import numpy as np, jax, jax.numpy as jnp, hla
        rng = np.random.default_rng(0)
        q, k, v = (jnp.asarray(x, jnp.float32) for x in rng.standard_normal((3, 2, 70, 8)))
        a = jnp.asarray(-rng.random((2, 70)), jnp.float32)
        wide = [np.asarray(x, np.float64) for x in (q, k, v, a)]
        o, state = hla.scan(q, k, v, log_gate=a, return_state=True)
        want, end = hla.scan(*wide[:3], log_gate=wide[3], return_state=True)
        assert {x.dtype for x in (o, *state)} == {jnp.dtype("float32")}
        assert abs(o - want).max() < 1e-5 * abs(want).max()
        hla.step(q[:, 0], k[:, 0], v[:, 0], state, decay=0.9)
        hla.combine(hla.summarize(q, k, v, decay=0.9), hla.summarize(q, k, v, decay=0.9))
        jax.grad(lambda q: hla.scan(q, k, v, decay=0.9).sum())(q)
        hla.scan(*(x.astype(jnp.bfloat16) for x in (q, k, v)), decay=np.float64(0.9))
    """
    subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env=environment(JAX_ENABLE_X64="0"),
        check=True,
    )


@pytest.mark.parametrize("form", FORMS)
def test_torchs_derivatives_at_a_decay_of_zero(form):
    """Three, of reverse and forward mode, where values are not read: of a polynomial."""
    func = installed("torch").func
    x = load("torch").array(np.ones((3, 4, 1)), "float64")
    decay = np.array([0.0, 1e-200, 0.5])

    def last(g):  # g^3 + g^2 + g + 1
        o = hla.scan(x, x, x, operator="linear", decay=g, form=form, chunk_size=3)
        return o[:, -1, 0].sum()

    g, places = load("torch").array(decay, "float64"), np.arange(3)
    for outer, inner in itertools.product((func.jacrev, func.jacfwd), repeat=2):
        second = outer(inner(last))
        close(np.diag(to_numpy(second(g))), 6 * decay + 2)
        third = to_numpy(func.jacrev(second)(g))
        close(third[places, places, places], np.full(3, 6.0))
