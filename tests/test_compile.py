"""torch.compile and torch.export where no kernel runs: the generic code is one operator there."""

import io
import itertools
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from conftest import MASKS, OPERATORS, draw, environment, gates, installed

import hla
from hla.arguments import prepare
from hla.backends import array_api
from hla.core import reference

torch = installed("torch")
aot_autograd = installed("torch._dynamo.backends.common").aot_autograd
leaves_of = torch.utils._pytree.tree_leaves
H, D, V = 2, 5, 3


def tensors(T, gate="resets", **size):
    q, k, v = draw(H, T, D=D, V=V, **size)
    given = {"q": q, "k": k, "v": v} | gates(gate, H, T)
    return {n: torch.tensor(x) for n, x in given.items()}


def agree(got, want, tol=1e-9):
    got, want = ([x for x in leaves_of(y) if x is not None] for y in (got, want))
    for x, y in zip(got, want, strict=True):
        size = float(abs(y).max()) if y.numel() else 1.0
        torch.testing.assert_close(x, y, rtol=0, atol=tol * max(size, 1.0))


class Graphs:
    """A compiler that notes the graphs it is given, forwards and backwards."""

    def __init__(self):
        self.seen = []
        self.backend = aot_autograd(fw_compiler=self.note)

    def note(self, graph, inputs):
        self.seen.append([str(node.target) for node in graph.graph.nodes])
        return graph

    def named(self, name):
        return [x for x in self.seen if any(target.startswith(name) for target in x)]


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("operator", "mask", "gate", "form"),
    [("hla2", "causal", "resets", None), ("hla3", "prefix", "per_head", "associative")],
)
def test_one_graph_serves_every_length(operator, mask, gate, form):
    """Forwards and backwards: as many nodes whatever T, with a state going in and out."""
    _, start = hla.scan(*tensors(4, "none").values(), operator=operator, mask=mask, decay=0.9,
                        return_state=True)  # fmt: skip

    def f(arrays, state):
        return hla.scan(**arrays, operator=operator, mask=mask, form=form, scale=0.5, eps=0.1,
                        normalize=True, initial_state=state, return_state=True)  # fmt: skip

    graphs = Graphs()
    compiled = torch.compile(f, backend=graphs.backend, fullgraph=True, dynamic=True)
    for T in (9, 64, 200):
        found = []
        for run in (compiled, f):
            arrays = {n: x.requires_grad_() for n, x in tensors(T, gate, positive=True).items()}
            state = type(start)(*(abs(x.detach()).requires_grad_() for x in start))
            outputs = leaves_of(run(arrays, state))
            inputs = (*arrays.values(), *state)
            weighed = sum(torch.linspace(1, 2, x.numel()) @ x.float().flatten() for x in outputs)
            found.append((outputs, torch.autograd.grad(weighed, inputs)))
        agree(*found, tol=1e-6)
        agree(found[0][0], found[1][0])
        if T == 9:
            first = len(graphs.seen)
    assert len(graphs.seen) == first
    for name, most in (("hla.scan.", 60), ("hla.scan_backward.", 60)):
        assert graphs.named(name)
        assert all(len(x) < most for x in graphs.named(name))
    assert not graphs.named("aten.bmm")


def test_the_other_functions_in_one_graph():
    """step, summarize, combine, vjp and its pullback, also one that leaves the graph."""
    operator = "hla2"
    (q, k, v), decay = (tensors(70, "none")[n] for n in "qkv"), torch.tensor([0.5, 0.9])

    def f(q, k, v, decay):
        options = {"operator": operator, "decay": decay}
        segment = hla.summarize(q, k, v, **options)
        state = hla.combine(segment, segment).to_state()
        o, after = hla.step(q[:, 0], k[:, 0], v[:, 0], state, **options)
        (whole, end), pullback = hla.vjp(q, k, v, return_state=True, ridge=0.1,
                                         initial_state=after, **options)  # fmt: skip
        alone, other = hla.vjp(q, k, v, **options)
        return (o, after, whole, end, pullback(whole, end), pullback(None, end)), alone, other

    graphs = Graphs()
    compiled = torch.compile(f, backend=graphs.backend, fullgraph=True)
    results = []
    for run in (compiled, f):
        given = [x.clone().requires_grad_() for x in (q, k, v, decay)]
        found, o, pullback = run(*given)
        with torch.no_grad():
            late = pullback(o)
        loss = sum((x.double() ** 2).sum() for x in leaves_of(found) if x is not None)
        results.append((found, late, torch.autograd.grad(loss, given)))
    agree(*results, tol=1e-6)
    assert graphs.named("hla.summarize.")
    assert graphs.named("hla.scan_backward.")
    assert max(map(len, graphs.seen)) < 600


def test_a_step_is_plain_operations():
    """A compiler sees them, and one graph serves every batch."""

    def f(q, k, v, state):
        return hla.step(q, k, v, state, decay=0.9, normalize=True, donate=True)

    graphs = Graphs()
    compiled = torch.compile(f, backend=graphs.backend, fullgraph=True, dynamic=True)
    for batch in (4, 3):
        token = [x[0].clone() for x in tensors(batch, "none").values()]
        _, state = hla.step(*token)
        packed = state.pack()
        agree(compiled(*token, packed), f(*token, packed))
    assert len(graphs.seen) == 1
    assert not graphs.named("hla.")


def test_torch_func_within_a_graph():
    """First and second derivatives and forward mode, with the operators where there are any."""
    q, k, v = tensors(9, "none").values()
    decay = torch.tensor([0.5, 0.9])
    grad, vmap = torch.func.grad, torch.func.vmap

    def loss(q, decay):
        return (hla.scan(q, k, v, decay=decay) ** 2).sum() / 1e6

    def f(q, decay):
        twice = grad(lambda q: grad(loss)(q, decay).square().sum())(q)
        each = vmap(grad(loss, argnums=(0, 1)), in_dims=(0, None))(torch.stack([q, -q]), decay)
        along = torch.func.jvp(lambda q: loss(q, decay), (q,), (k,))
        return twice, each, along

    agree(torch.compile(f, backend="aot_eager", fullgraph=True)(q, decay), f(q, decay), 1e-8)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.decay = torch.nn.Parameter(torch.tensor([0.5, 0.9]))

    def forward(self, q, k, v, state):
        o, end = hla.scan(q, k, v, decay=self.decay, initial_state=state, return_state=True)
        segment = hla.summarize(q, k, v, decay=self.decay)
        return o, hla.combine(end, segment)


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_export_saves_a_program_with_a_state(strict):
    q, k, v = tensors(9, "none").values()
    _, state = hla.scan(q, k, v, return_state=True)
    model, tokens = Model(), torch.export.Dim("tokens", min=2, max=4096)
    shapes = [*[{1: tokens}] * 3, type(state)(None, None, None)]
    program = torch.export.export(model, (q, k, v, state), dynamic_shapes=shapes, strict=strict)
    assert "hla.scan.default" in [str(node.target) for node in program.graph.nodes]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for T in (2, 70):
        given = (*tensors(T, "none").values(), state)
        want = model(*given)
        got = loaded(*given)
        assert type(got[1]) is type(want[1])
        agree(got, want)


def vjp_of(q, k, v, log_gate):
    (o, state), pullback = hla.vjp(q, k, v, operator="ahla", log_gate=log_gate, return_state=True)
    return o, *state, *pullback(o, state)[:3]


def joined(q, k, v, log_gate):
    segment = hla.summarize(q, k, v, log_gate=log_gate)
    return tuple(x for x in hla.combine(segment, segment) if x is not None)


def continued(q, k, v, log_gate):
    _, state = hla.scan(q, k, v, operator="hla3", log_gate=log_gate, return_state=True)
    token = q[..., 0, :], k[..., 0, :], v[..., 0, :]
    o, state = hla.step(*token, state, operator="hla3", decay=0.9)
    return o, *state


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("call", [vjp_of, joined, continued])
def test_a_trace_serves_every_length(call):
    """torch.jit.trace records operators, not the loop over the chunks that it saw."""
    trace = torch.jit.trace(call, tuple(tensors(7).values()), check_trace=False)
    for T in (1, 7, 130):
        given = tensors(T).values()
        agree(trace(*given), call(*given))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_was_traced_without_gradients_has_them():
    def call(q, k, v):
        return hla.scan(q, k, v, operator="hla3", normalize=True)

    trace = torch.jit.trace(call, tuple(tensors(7, "none").values()), check_trace=False)
    given = [x.requires_grad_() for x in tensors(70, "none", positive=True).values()]
    results = ((f(*given) ** 2).sum() for f in (trace, call))
    agree(*(torch.autograd.grad(x, given) for x in results))


def test_opcheck():
    """Schema, autograd, fake tensors and dynamic shapes of the operators over generic code."""
    from hla.libraries.torch_graph import nodes

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "hla":
                calls[function] = args
            return function(*args, **(kwargs or {}))

    calls, options = {}, {"operator": "hla2", "mask": "causal", "decay": None, "scale": 0.5}
    *qkv, log_gate = (x.requires_grad_() for x in tensors(9).values())
    with Seen():
        o, state = nodes["scan"](*qkv, None, log_gate=log_gate, return_state=True, **options)
        segment = nodes["summarize"](*qkv, None, log_gate=log_gate, **options)
        sum(x.sum() for x in (o, *state, *segment)).backward()
    names = {x._schema.name for x in calls}
    assert names == {"hla::scan", "hla::scan_backward", "hla::summarize", "hla::summarize_backward"}
    for function, args in calls.items():
        fresh = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda x: x.detach().clone().requires_grad_(), args
        )
        assert set(torch.library.opcheck(function, fresh).values()) == {"SUCCESS"}


@pytest.mark.parametrize("T", [0, 1, 9])
def test_what_is_told_of_strides_is_so(T):
    """Also of one token, of one head and of nothing, where torch calls many strides contiguous."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from hla.libraries.torch_graph import nodes

    def results(take):
        q, k, v = (take(torch.ones(1, 1, T, n)) for n in (4, 4, 3))
        options = {"operator": "hla2", "mask": "causal", "decay": None, "log_gate": None}
        options |= {"scale": 0.5, "return_state": True}
        o, state, saved = nodes["forward"](q, k, v, None, **options)
        return leaves_of((o, state, saved, nodes["backward"](q, k, v, None, o, saved, o, state,
                                                          **options)))  # fmt: skip

    real = results(lambda x: x)
    with FakeTensorMode() as mode:
        fake = results(mode.from_tensor)
    for x, y in zip(fake, real, strict=True):
        if y is not None:
            assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
    memory = [x.data_ptr() for x in real if x is not None and x.numel()]
    assert len(set(memory)) == len(memory)


SHAPES = {  # of the batch: q, k, v
    "one head": ((), (), ()),
    "shared keys": ((2, 3), (3,), (2, 1)),
    "shared queries": ((1, 3), (2, 1), (3,)),
    "further values": ((3,), (3,), (2, 1)),
}


@pytest.mark.parametrize("batches", SHAPES.values(), ids=SHAPES)
def test_shapes_are_told_from_the_request(batches):
    """What an operator says of its results without running: `reference.shapes` is what comes."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.random((*b, 6, n)) for b, n in zip(batches, (D, D, V), strict=True))
    for operator, mask, form in itertools.product(OPERATORS, MASKS, (None, "associative")):
        for gate in ({}, {"decay": np.full((3, 1), 0.5)}, {"log_gate": -rng.random((3, 6))}):
            if mask == "none" and (gate or form):
                continue
            if np.broadcast_shapes(*batches) == () and gate:
                gate = {n: x[0, ...] if n == "log_gate" else x[0, 0] for n, x in gate.items()}
            elif "decay" in gate:
                gate = {"decay": gate["decay"][:, 0]}
            for state in (False, True) if mask != "none" else (False,):
                request, inputs, _ = prepare(
                    q, k, v, operator=operator, mask=mask, decay=gate.get("decay"), scale=1.0,
                    log_gate=gate.get("log_gate"), return_state=state, form=form, gradient=True,
                )  # fmt: skip
                o, end, saved = array_api.forward(request, inputs)
                want = o.shape, tuple(x.shape for x in end or ()), tuple(x.shape for x in saved)
                assert reference.shapes(request) == want
                told = leaves_of(array_api.empty(request, inputs))
                for x, y in zip(told, leaves_of((o, end, saved)), strict=True):
                    assert y is None or (x.shape, x.dtype) == (y.shape, y.dtype)


@pytest.mark.aot
def test_the_first_call_of_a_process_may_be_compiled():
    """The compiler reads how the library of an array is found: by what it can run."""
    code = """
        import torch, hla
        S, F, eta = torch.ones(2, 4, 4), torch.ones(2, 4, 3), torch.ones(2, 4)
        f = lambda state: state.pack().unpack().S + 1
        compiled = torch.compile(f, backend="eager", fullgraph=True)
        assert (compiled(hla.states.HLA2State(S, F, eta)) == S + 1).all()
        o = torch.compile(hla.scan, backend="eager", fullgraph=True)(S, S, F)
        assert torch.allclose(o, hla.scan(S, S, F))
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    subprocess.run(command, env=environment(), check=True)
