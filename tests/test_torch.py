"""An opaque backend as operators of torch: autograd, torch.func, compile, export, autocast.

hla::scan and hla::scan_backward wrap any backend; here those of torch's devices.
"""

import functools

import numpy as np
import pytest
from conftest import OPERATORS, budget, close, draw, errors, gates, installed, to_numpy
from devices import of_torch, rows_of

import hla
from hla import backends
from hla.libraries import rules

torch = installed("torch")
TorchDispatchMode = installed("torch.utils._python_dispatch").TorchDispatchMode
tree_flatten = installed("torch.utils._pytree").tree_flatten
tree_map_only = installed("torch.utils._pytree").tree_map_only
H, T, D, V = 2, 9, 5, 3
# operator, mask, gate, state in and out, normalize
CALLS = [
    ("linear", "causal", "per_head", True, False),
    ("hla2", "causal", "resets", True, False),
    ("hla2", "none", "none", False, True),
    ("ahla", "prefix", "none", True, True),
    ("hla3", "causal", "per_head", False, False),
]
NAMES = ["-".join(str(x) for x in options[:3]) for options in CALLS]


@pytest.fixture(params=rows_of(of_torch))
def device(request):
    return request.param


@pytest.fixture
def tensor(device):
    return device.array


@pytest.fixture
def call(device):
    return functools.partial(call_of, device)


def call_of(device, operator="hla2", mask="causal", gate="none", stateful=False, normalize=False,
            T=T, **size):  # fmt: skip
    """Tensors of one call by argument, fields of the state apart, and a function of them."""
    tensor = device.array
    q, k, v = draw(H, T, positive=normalize, **size)
    tensors = {"q": tensor(q), "k": tensor(k), "v": tensor(v)}
    tensors |= {n: tensor(x) for n, x in gates(gate, H, T).items()}
    options = {"operator": operator, "mask": mask, "normalize": normalize, "scale": 0.5, "eps": 0.1}
    kind = None
    if stateful:
        _, state = hla.scan(*(tensor(x) for x in draw(H, 4, **size)), return_state=True,
                            operator=operator, mask=mask, backend="array_api")  # fmt: skip
        kind = type(state)
        tensors |= {"state " + n: abs(x) if normalize else x for n, x in state._asdict().items()}

    def f(*given, backend=device.backend):
        arrays = dict(zip(tensors, given, strict=True))
        fields = [arrays.pop(n) for n in list(arrays) if n.startswith("state ")]
        if not stateful:
            return (hla.scan(**arrays, **options, backend=backend),)
        o, state = hla.scan(
            **arrays, **options, initial_state=kind(*fields), return_state=True, backend=backend
        )
        return (o, *state)

    return tensors, f


def leaves(tensors):
    return [x.detach().clone().requires_grad_() for x in tensors.values()]


def loss(outputs, seed=3):
    """A scalar with another gradient for each element of each output."""
    rng = np.random.default_rng(seed)
    return sum((x * x.new_tensor(rng.standard_normal(x.shape))).sum() for x in outputs)


def agree(got, want, tol=1e-5):
    """Equal up to float32's rounding, None and zeros alike."""
    for x, y in zip(got, want, strict=True):
        if x is None or y is None:
            assert not (y if x is None else x if y is None else torch.zeros(())).any()
        else:
            close(to_numpy(x.detach().cpu().double()), to_numpy(y.detach().cpu().double()), tol,
                  size=max(1e-3, float(y.detach().abs().max())))  # fmt: skip


@pytest.mark.parametrize("options", CALLS, ids=NAMES)
def test_gradients_are_those_of_vjp(call, options):
    """torch's autograd, and the operators with it, to every input; the bits of hla.vjp."""
    tensors, f = call(*options)
    inputs = leaves(tensors)
    outputs = f(*inputs)
    assert all(x.requires_grad for x in outputs)
    got = torch.autograd.grad(loss(outputs), inputs, allow_unused=True, retain_graph=True)
    again = torch.autograd.grad(loss(outputs), inputs, allow_unused=True)
    agree(again, got, 0.0)
    wide = [x.double().requires_grad_() for x in tensors.values()]
    want = torch.autograd.grad(loss(f(*wide, backend="array_api")), wide, allow_unused=True)
    for name, x, y in zip(tensors, got, want, strict=True):
        if name in ("state S", "state Q"):
            x, y = x + x.mT, y + y.mT
        agree([x], [None if y is None else y.float()], 1e-5)


def test_gradients_go_only_where_asked(call):
    tensors, f = call("hla2", "causal", "per_head", True)
    assert not any(x.requires_grad for x in f(*tensors.values()))
    whole = leaves(tensors)
    want = dict(zip(tensors, torch.autograd.grad(loss(f(*whole)), whole), strict=True))
    for name in tensors:
        given = {n: x.clone().requires_grad_(n == name) for n, x in tensors.items()}
        loss(f(*given.values())).backward()
        agree([given[name].grad], [want[name]], 0.0)
        assert all(x.grad is None for n, x in given.items() if n != name)
        with torch.no_grad():
            assert not any(x.requires_grad for x in f(*given.values()))


@pytest.mark.parametrize(
    ("gate", "compiled"),
    [("per_head", False), ("resets", False), ("resets", True)],
    ids=["per_head-eager", "resets-eager", "resets-compiled"],
)
def test_a_gate_that_asks_for_no_gradient_costs_none(call, device, gate, compiled, monkeypatch):
    """The backend is not asked for it."""
    torch._dynamo.reset()
    tensors, f = call("hla2", "causal", gate)
    from hla.libraries import torch_scan

    asked, backend = [], torch_scan.loaded(device.backend)

    def spy(request, *args):
        asked.append(request.gate_given)
        return backend.backward(request, *args)

    monkeypatch.setattr(torch_scan, "loaded", lambda name: backend._replace(backward=spy))
    run = torch.compile(f, backend="aot_eager", fullgraph=True) if compiled else f
    found = {}
    for wanted in (True, False):
        given = {n: x.clone().requires_grad_(n in "qkv" or wanted) for n, x in tensors.items()}
        asked.clear()
        loss(run(*given.values())).backward()
        assert any(asked) is wanted
        found[wanted] = [given[n].grad for n in "qkv"]
    agree(found[False], found[True], 0.0)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_outputs_that_nothing_reads(call, which):
    """The loss reads o, or one field of the state, alone."""
    tensors, f = call("hla2", "causal", "resets", True)
    inputs, wide = leaves(tensors), [x.double().requires_grad_() for x in tensors.values()]
    got = torch.autograd.grad(f(*inputs)[which].sum(), inputs, allow_unused=True)
    want = torch.autograd.grad(f(*wide, backend="array_api")[which].sum(), wide, allow_unused=True)
    for name, x, y in zip(tensors, got, want, strict=True):
        x, y = (None if z is None else z + z.mT if name == "state S" else z for z in (x, y))
        agree([x], [None if y is None else y.float()])


@pytest.mark.parametrize("options", CALLS, ids=NAMES)
def test_double_backward(call, device, options):
    """A gradient of a gradient, to every input: that of the generic code in float64."""
    tensors, f = call(*options)

    def twice(inputs, backend):
        outputs = f(*inputs, backend=backend)
        first = torch.autograd.grad(
            loss([x**2 / (1 + x.detach().abs()) for x in outputs]), inputs, create_graph=True,
            allow_unused=True,
        )  # fmt: skip
        return torch.autograd.grad(loss([x for x in first if x is not None], 5), inputs,
                                   allow_unused=True)  # fmt: skip

    wide = [x.double().requires_grad_() for x in tensors.values()]
    got, want = twice(leaves(tensors), device.backend), twice(wide, "array_api")
    for name, x, y in zip(tensors, got, want, strict=True):
        if name in ("state S", "state Q"):
            x, y = (None if z is None else z + z.mT for z in (x, y))
        agree([x], [None if y is None else y.float()], 1e-4)


def test_steps_are_differentiable(call, device):
    tensors, _ = call("hla2", "causal", "per_head")

    def f(q, k, v, decay, backend=device.backend):
        state, outputs = None, []
        for t in range(3):
            o, state = hla.step(q[:, t], k[:, t], v[:, t], state, decay=decay, backend=backend)
            outputs.append(o)
        return (*outputs, *state)

    inputs, wide = leaves(tensors), [x.double().requires_grad_() for x in tensors.values()]
    got = torch.autograd.grad(loss(f(*inputs)), inputs)
    want = torch.autograd.grad(loss(f(*wide, backend="array_api")), wide)
    agree(got, [x.float() for x in want])


class Seen(TorchDispatchMode):
    """Notes the arguments of hla's operators."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "hla":
            self.calls[function] = args
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(  # ten seconds each
    "options",
    [
        pytest.param(CALLS[1], id=NAMES[1]),
        pytest.param(CALLS[3], id=NAMES[3], marks=pytest.mark.aot),
    ],
)
def test_opcheck(call, options):
    """Schema, autograd, fake tensors and dynamic shapes of both operators."""
    tensors, f = call(*options)
    with Seen() as seen:
        inputs = leaves(tensors)
        torch.autograd.grad(loss(f(*inputs)), inputs, allow_unused=True)
    assert {x._schema.name for x in seen.calls} == {"hla::scan", "hla::scan_backward"}
    for function, args in seen.calls.items():
        fresh = tree_map_only(torch.Tensor, lambda x: x.detach().clone().requires_grad_(), args)
        results = torch.library.opcheck(function, fresh)
        assert len(results) == 4
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("operator", OPERATORS)
def test_torch_func(tensor, device, operator):
    """vmap over any axis, grad, and both: the bits of the batched call."""
    q, k, v = (tensor(x) for x in draw(3, T, D=D, V=V))
    w = tensor(np.random.default_rng(0).random((3, T, V)))
    decay = tensor([0.5, 0.8, 1.0])

    def f(q, k, v, decay):
        return hla.scan(q, k, v, decay=decay, operator=operator, backend=device.backend)

    def weighed(q, k, v, decay, w):
        return (f(q, k, v, decay) * w).sum()

    vmap, grad = torch.func.vmap, torch.func.grad
    got = vmap(f, in_dims=(0, 1, None, 0))(q, k.movedim(0, 1), v[0], decay)
    agree([got], [f(q, k, v[:1], decay)], 0.0)
    twice = vmap(vmap(f, in_dims=(0, None, 0, None)), in_dims=(None, None, 0, 0))
    both = torch.stack([f(q, k[0], v * s, decay[i]) for i, s in enumerate((1.0, 2.0))])
    agree([twice(q, k[0], torch.stack([v, 2 * v]), decay[:2])], [both], 0.0)
    gradient = grad(weighed, argnums=(0, 1, 2, 3))
    inputs = [x.clone().requires_grad_() for x in (q, k, v, decay)]
    want = torch.autograd.grad(weighed(*inputs, w), inputs)
    agree(gradient(q, k, v, decay, w), want, 0.0)
    agree(vmap(gradient)(q, k, v, decay, w), want, 0.0)
    shared = vmap(gradient, in_dims=(0, None, 0, 0, 0))(q, k[0], v, decay, w)
    agree(shared, vmap(gradient)(q, k[:1].expand(k.shape), v, decay, w), 0.0)


def test_vmap_over_states(call):
    tensors, f = call("hla2", "causal", "resets", True)
    want = f(*tensors.values())
    got = torch.func.vmap(f)(*tensors.values())
    agree(got, want, 0.0)

    def gradient(*inputs):
        outputs, pullback = torch.func.vjp(f, *inputs)
        return pullback(tuple(torch.ones_like(x) for x in outputs))

    agree(torch.func.vmap(gradient)(*tensors.values()), gradient(*tensors.values()), 1e-6)


def test_torch_func_of_one_argument_alone(call, device):
    """A transform may see the decay, the gate or the state and not q, k or v."""
    for gate in ("per_head", "resets"):
        tensors, f = call("hla2", "causal", gate, True)
        names = [n for n in tensors if n not in "qkv"]
        whole = leaves(tensors)
        want = dict(zip(tensors, torch.autograd.grad(loss(f(*whole)), whole), strict=True))
        for name in names:

            def g(x, name=name, f=f, tensors=tensors):
                return loss(f(*(tensors | {name: x}).values()))

            x = tensors[name]
            agree([torch.func.grad(g)(x)], [want[name]], 1e-6)
            both = torch.func.vmap(torch.func.grad(g))(torch.stack([x, x]))
            agree(both, [want[name], want[name]], 1e-6)
            with pytest.raises(
                hla.Unsupported, match=rf"(?s){device.backend}.*forward-mode.*array_api"
            ):
                torch.func.hessian(g)(x)


def test_derivatives_of_derivatives_are_mapped(tensor, device):
    """jacrev of a gradient, twice, and over several starts: vmap of what has no batching rule."""
    q, k, v = (tensor(x) for x in draw(1, 3, D=2, V=1))
    func = torch.func

    def f(q, decay, backend):
        return (hla.scan(q, k, v, decay=decay, backend=backend) ** 2).sum()

    second = func.jacrev(func.grad(f, argnums=(0, 1)), argnums=1)
    third = func.vmap(func.jacrev(second, argnums=1), in_dims=(None, 0, None))
    decays = tensor([[0.5], [0.9]])
    for g in (lambda b: second(q, decays[0], b), lambda b: third(q, decays, b)):
        agree(g(device.backend), g("array_api"), 1e-4)


def test_pullbacks_under_torch_func(call, tensor, device):
    """What `hla.vjp` gives can be mapped, and differentiated again."""
    q, k, v = call()[0].values()
    v = torch.stack([v, -v])  # with an axis that q, k and the state of the keys lack
    _, start = hla.scan(q, k, v, decay=0.9, return_state=True, backend=device.backend)
    decay = tensor([0.5, 0.9])
    given = {
        "decay": decay,
        "initial_state": start,
        "return_state": True,
        "backend": device.backend,
    }
    (o, end), pullback = hla.vjp(q, k, v, **given)

    def scaled(s):
        *grads, _, dstate = pullback(o * s, type(end)(*(x * s for x in end)))
        return (*grads, *dstate)

    scales = tensor([1.0, 2.0])
    mapped = torch.func.vmap(scaled)(scales)
    for i, s in enumerate(scales):
        agree([x[i] for x in mapped], scaled(s), 1e-6)

    def squared(q, backend):
        o, pullback = hla.vjp(q, k, v, decay=decay, backend=backend)
        return (pullback(o).dk ** 2).sum()

    leaf = q.clone().requires_grad_()
    (eager,) = torch.autograd.grad(squared(leaf, device.backend), leaf)
    agree([eager], [torch.func.grad(squared)(q, device.backend)], 1e-6)
    agree([eager], [torch.func.grad(squared)(q, "array_api")], 1e-5)


@pytest.mark.parametrize(
    ("options", "dynamic"),
    [*((x, False) for x in CALLS), (CALLS[1], True)],
    ids=[*(f"{x}-static" for x in NAMES), f"{NAMES[1]}-dynamic"],
)
def test_compile(call, options, dynamic):
    """One graph without a break, forwards and backwards; dynamic: one for several lengths."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    lengths = (T, T + 4, T + 7) if dynamic else (T,)
    _, f = call(*options)
    compiled = torch.compile(f, backend=backend, fullgraph=True, dynamic=dynamic)
    for n in lengths:
        tensors, _ = call(*options, T=n)
        inputs, others = leaves(tensors), leaves(tensors)
        outputs, want = compiled(*inputs), f(*others)
        agree(outputs, want, 0.0)
        agree(
            torch.autograd.grad(loss(outputs), inputs, allow_unused=True),
            torch.autograd.grad(loss(want), others, allow_unused=True), 0.0,
        )  # fmt: skip
        with torch.no_grad():
            agree(compiled(*tensors.values()), want, 0.0)
        if n == T:
            first = len(graphs)
    assert len(graphs) == first  # one for all lengths
    assert len(graphs) <= 3  # with gradients (where a float was taken for a symbol, again), without
    names = {str(node.target) for node in graphs[-1].graph.nodes if node.op == "call_function"}
    assert any("scan" in name for name in names)


def test_compiled_step_with_its_state(call, device):
    torch._dynamo.reset()
    q, k, v = (x[:, 0] for x in call()[0].values())
    f = functools.partial(hla.step, operator="hla3", decay=0.9, backend=device.backend)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    state = f(q, k, v)[1]
    o, after = compiled(q, k, v, state)
    want, end = f(q, k, v, state)
    assert type(after) is type(end)
    agree((o, *after), (want, *end), 0.0)


class Model(torch.nn.Module):
    def __init__(self, device, operator):
        super().__init__()
        self.operator, self.backend = operator, device.backend
        self.decay = torch.nn.Parameter(device.array([0.5, 0.9]))

    def forward(self, q, k, v):
        o, state = hla.scan(q, k, v, decay=self.decay, operator=self.operator, return_state=True,
                            backend=self.backend)  # fmt: skip
        return (o, *state)


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@pytest.mark.parametrize("operator", ["hla2", "hla3"])
def test_export(call, device, operator, strict):
    torch._dynamo.reset()
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    model = Model(device, operator)
    given = tuple(call()[0].values())
    program = torch.export.export(model, given, dynamic_shapes=[{1: tokens}] * 3, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert "hla.scan.default" in targets
    for n in (2, T, 70):
        given = tuple(call(T=n)[0].values())
        agree(program.module()(*given), model(*given), 0.0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(call, reentrant):
    tensors, f = call("hla2", "causal", "resets", True)
    inputs, others = leaves(tensors), leaves(tensors)
    got = torch.utils.checkpoint.checkpoint(f, *inputs, use_reentrant=reentrant)
    want = f(*others)
    agree(got, want, 0.0)
    loss(got).backward()
    loss(want).backward()
    agree([x.grad for x in inputs], [x.grad for x in others], 0.0)


@pytest.mark.parametrize("plain", [True, False])
def test_autocast_mixes_dtypes(call, tensor, device, plain):
    """Operands come as autocast casts them, the core's own products are not cast again."""
    backend = "array_api" if plain else device.backend
    dtype = getattr(torch, "bfloat16" if plain or "bfloat16" in device.dtypes else "float16")
    q, k, v = call(T=70, D=24, V=16)[0].values()
    leaf = k.clone().requires_grad_()
    decay = tensor([0.9, 1.0])
    with torch.autocast(device.place, dtype=dtype):
        o = hla.scan(q.to(dtype), leaf, v, decay=decay, scale=0.2, backend=backend)
    assert o.dtype == dtype
    (o.float() * v).sum().backward()
    assert leaf.grad.dtype == torch.float32
    narrow = [x.to(dtype).double().cpu().numpy() for x in (q, k, v)]
    want, pullback = hla.vjp(*narrow, decay=decay.double().cpu().numpy(), scale=0.2)
    name, D_ = str(dtype).removeprefix("torch."), {"D": 24, "T": 70, "operator": "hla2"}
    for x, y, size in (
        (o, want, D_), (leaf.grad, pullback(v.double().cpu().numpy()).dk, D_ | {"gradient": True})
    ):  # fmt: skip
        found = errors(to_numpy(x.detach().cpu().double()), y)
        assert found <= budget(name, **size)
    plain = hla.scan(*(x.to(dtype) for x in (q, k, v)), decay=decay, scale=0.2, backend=backend)
    agree([o], [plain], 0.0)


def test_forward_mode_is_refused_with_the_remedy(call, device):
    q, k, v = call()[0].values()

    def f(q, **options):
        return hla.scan(q, k, v, **options)

    with pytest.raises(hla.Unsupported, match=rf"(?s){device.backend}.*forward-mode.*array_api"):
        torch.func.jvp(functools.partial(f, backend=device.backend), (q,), (q,))
    o, tangent = torch.func.jvp(functools.partial(f, backend="array_api"), (q,), (q,))
    agree([tangent], [2 * o], 1e-5)  # of degree 2 in q
    with torch.autograd.forward_ad.dual_level():  # a level alone is no tangent
        f(q, backend=device.backend)
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(hla.Unsupported, match="forward-mode"):
            f(dual, backend=device.backend)


FUNC = {  # forward mode at any depth of torch.func's transforms
    "hessian": lambda f, q: torch.func.hessian(f)(q),
    "jvp of grad": lambda f, q: torch.func.jvp(torch.func.grad(f), (q,), (q,)),
    "grad of jvp": lambda f, q: torch.func.grad(lambda x: torch.func.jvp(f, (x,), (x,))[1])(q),
    "jvp of vmap": lambda f, q: torch.func.jvp(torch.func.vmap(f), (q,), (q,)),
    "vmap of jvp": lambda f, q: torch.func.vmap(lambda x: torch.func.jvp(f, (x,), (x,)))(q),
}


@pytest.mark.parametrize("transform", FUNC.values(), ids=FUNC)
@pytest.mark.parametrize("call", [hla.scan, hla.step], ids=["scan", "step"])
def test_forward_mode_is_refused_within_other_transforms(tensor, device, call, transform):
    x = tensor(np.ones((2, 3, 4)))

    def f(x):
        o = call(x, x, x, backend=device.backend)
        return (o[0] if call is hla.step else o).sum()

    with pytest.raises(hla.Unsupported, match="forward-mode"):
        transform(f, x)
    torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(x)  # reverse mode twice is not


def test_lazily_negated_tensors_reach_a_backend_as_memory_has_them(call, monkeypatch):
    """The imaginary part of a conjugate has its sign in a flag, which no kernel reads."""
    plain, seen = backends.load("array_api"), []

    def spy(function):
        def spied(request, *args):
            seen.extend(tree_flatten(args)[0])
            return function(request, *args)

        return spied

    spied = plain._replace(forward=spy(plain.forward), backward=spy(plain.backward))
    monkeypatch.setattr(rules, "differentiable", lambda *names: spied)

    def lazily(x):
        y = torch.complex(torch.zeros_like(x), -x).conj().imag
        assert y.is_neg()
        return y

    inputs, _ = call("hla2", "causal", "resets")
    x = {n: lazily(y) for n, y in inputs.items()}
    options = {"return_state": True, "backend": "array_api"}
    (o, state), _ = hla.vjp(**inputs, **options)
    state = type(state)(*map(lazily, state))
    _, pullback = hla.vjp(**x, initial_state=state, **options)
    pullback(lazily(o), state)
    tensors = [y for y in seen if isinstance(y, torch.Tensor)]
    assert len(tensors) > 20
    assert not any(y.is_neg() for y in tensors)


def test_fake_and_meta_tensors_have_shapes_alone(call):
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors, f = call("hla3", "causal", "per_head", True)
    want = f(*tensors.values())
    with FakeTensorMode() as mode:
        got = f(*(mode.from_tensor(x) for x in tensors.values()))
    for x, y in zip(got, want, strict=True):
        assert (x.shape, x.dtype, x.stride(), x.device) == (y.shape, y.dtype, y.stride(), y.device)


def test_modules_and_hooks(call, device):
    """Gradients accumulate in parameters and hooks see them once a backward."""
    model, seen = Model(device, "ahla"), []
    model.decay.register_hook(seen.append)
    given = leaves(call()[0])
    for _ in range(2):
        loss(model(*given)).backward()
    assert len(seen) == 2
    agree([model.decay.grad], [seen[0] + seen[1]], 0.0)


def test_the_second_derivative_at_a_decay_of_zero(device):
    """Where values are not read: that of the generic code."""
    x, g = (device.array(y) for y in (np.ones((2, 4, 1)), np.array([0.0, 0.5])))

    def last(g):  # g^3 + g^2 + g + 1
        return hla.scan(x, x, x, operator="linear", decay=g, backend=device.backend)[:, -1, 0].sum()

    slope = torch.func.grad(last)
    close(to_numpy(slope(g).cpu()), [1, 2.75], 1e-5)
    close(to_numpy(torch.func.grad(lambda g: slope(g).sum())(g).cpu()), [2, 5], 1e-5)
