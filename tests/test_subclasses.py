"""Tensors of torch that are no plain memory: subclasses, pending signs, wrappers, tracers' own.

A backend that reads memory takes what has some and refuses the rest: what it allocates is written
or has no memory either.
"""

import functools

import pytest
from conftest import close, draw, installed, to_numpy
from devices import of_torch, poison_empty, rows_of

import hla
from hla.libraries import library_of

torch = installed("torch")
TwoTensor = installed("torch.testing._internal.two_tensor").TwoTensor
fake_tensor = installed("torch._subclasses.fake_tensor")
FakeTensor, FakeTensorMode = fake_tensor.FakeTensor, fake_tensor.FakeTensorMode
make_fx = installed("torch.fx.experimental.proxy_tensor").make_fx
H, T, D, V = 1, 5, 4, 3


class Tagged(torch.Tensor):
    """Its results are of its type, as torch has it."""


class Weight(torch.nn.Parameter):
    """Its results are plain, as those of parameters."""


KINDS = {
    "subclass": lambda x: x.as_subclass(Tagged),
    "parameter": lambda x: Weight(x, requires_grad=x.requires_grad),
    "negated": lambda x: torch.complex(x, -x).conj().imag,
    "tag of a negated": lambda x: torch.complex(x, -x).conj().imag.as_subclass(Tagged),
}


@pytest.fixture(autouse=True)
def poison_torch(monkeypatch):
    poison_empty(monkeypatch, "torch")


@pytest.fixture(params=rows_of(of_torch))
def device(request):
    return request.param


@functools.cache
def arrays_of(device, operator):
    tensor = device.array
    q, k, v = (tensor(x) for x in draw(H, T, D=D, V=V))
    before = (tensor(x) for x in draw(H, 4, D=D, V=V, seed=1))
    state = hla.scan(*before, operator=operator, return_state=True, backend="array_api")[1]
    decay, do = tensor([0.9]), tensor(draw(H, T, V=V, seed=2)[2])
    return {"q": q, "k": k, "v": v, "decay": decay, "initial_state": state, "do": do}


def results(operator, backend, do, **arrays):
    """Output, last state and gradients by hla.vjp, a step by itself, and autograd's to q and v."""
    options = {"operator": operator, "backend": backend}
    (o, state), pullback = hla.vjp(**arrays, return_state=True, **options)
    gradients = pullback(do, state)
    token = {f"{n}_t": arrays[n][:, 0] for n in "qkv"}
    after = hla.step(**token, state=arrays["initial_state"], decay=arrays["decay"], **options)
    leaves = {n: arrays[n].detach().clone().requires_grad_() for n in "qv"}
    whole = hla.scan(**arrays | leaves, normalize=True, eps=9.0, **options)
    found = [o, *state, *gradients[:4], *gradients.dinitial_state, after[0], *after[1], whole]
    return [*found, *torch.autograd.grad(whole, leaves.values(), do)]


@functools.cache
def plain(device, operator):
    arrays = arrays_of(device, operator)
    want = results(operator, device.backend, **arrays)
    for x, y in zip(want, results(operator, "array_api", **arrays), strict=True):
        close(to_numpy(x.detach().cpu()), to_numpy(y.detach().cpu()), 1e-5)
    return want


@pytest.mark.parametrize("name", ["q", "v", "initial_state", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_subclasses_and_negated_views_are_read(device, kind, name, monkeypatch):
    """As any argument: the values of plain tensors, in the type that torch's own functions give."""
    from hla.device import scan

    call, make = scan.Ready.__call__, KINDS[kind]
    operator = "ahla" if name == "v" else "hla2"

    def spy(ready, tensors, *addresses):
        assert not any(x.is_neg() for x in tensors)
        return call(ready, tensors, *addresses)

    want, given = plain(device, operator), dict(arrays_of(device, operator))
    for n, x in given.items():
        if name in (n, "all"):
            given[n] = type(x)(*map(make, x)) if isinstance(x, tuple) else make(x)
    monkeypatch.setattr(scan.Ready, "__call__", spy)
    got = results(operator, device.backend, **given)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.detach().as_subclass(torch.Tensor), y.detach(), rtol=0, atol=0)
    if name in ("q", "all"):
        assert type(got[0]) is type(given["q"] + 0)
        assert type(got[0]) is type(results(operator, "array_api", **given)[0])


def test_zeros_without_memory_are_zeros(device):
    q, k, v = (device.array(x) for x in draw(H, T, D=D, V=V))
    zero = functools.partial(torch._efficientzerotensor, device=device.place)
    _, pullback = hla.vjp(q, k, v, backend=device.backend)
    assert not any(x.any() for x in pullback(zero((H, T, V)))[:3])
    assert not hla.scan(zero((H, T, D)), k, v, backend=device.backend).any()


def fake(f, *xs):
    mode = FakeTensorMode()
    got = f(*(mode.from_tensor(x) for x in xs))
    assert isinstance(got, FakeTensor)
    return torch.ones(got.shape)


CALLERS = {
    "wrapper": lambda f, q, k, v: f(TwoTensor(q, q.clone()), k, v).a,
    "wrapper as v": lambda f, q, k, v: f(q, k, TwoTensor(v, v.clone())).a,
    "vmap": lambda f, *xs: torch.func.vmap(f)(*xs),
    "grad": lambda f, *xs: torch.func.grad(lambda *ys: (f(*ys) ** 2).sum())(*xs),
    "fake": fake,
    "make_fx": lambda f, *xs: make_fx(f)(*xs)(*xs),
    "jit.trace": lambda f, *xs: torch.jit.trace(f, xs, check_trace=False)(*xs),
}


@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("call", ["scan", "vjp"])
@pytest.mark.parametrize("caller", CALLERS)
def test_what_has_no_memory_is_refused_or_right(device, caller, call, normalize):
    """By each way to call with what has none, or to record without the launches: never garbage."""
    q, k, v = (device.array(x) for x in draw(H, T, D=D, V=V, positive=True))

    def by(backend):
        def f(q, k, v):
            found = getattr(hla, call)(q, k, v, backend=backend, normalize=normalize)
            return found[0] if call == "vjp" else found

        return f

    try:
        got = CALLERS[caller](by(device.backend), q, k, v)
    except hla.Unsupported:
        assert call == "vjp", "scan is an operator, which all of these know"
        return
    if caller == "grad":
        want = CALLERS[caller](by("array_api"), q, k, v)
    else:
        want = by("array_api")(q, k, v)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    if caller != "fake":
        close(to_numpy(got.detach().cpu()), to_numpy(want.detach().cpu()), 1e-5)


def test_only_what_is_not_there_counts_as_traced():
    x = torch.ones(2, 3)
    for make in (torch.nn.Parameter, torch.nn.Buffer, *KINDS.values()):
        assert not library_of(x).traced(make(x))
    seen = []
    torch.func.vmap(lambda y: seen.append(library_of(y).traced(y)) or y)(x)
    torch.jit.trace(lambda y: seen.append(library_of(y).traced(y)) or y, x, check_trace=False)
    for y in (x.to("meta"), FakeTensorMode().from_tensor(x), TwoTensor(x, x)):
        seen.append(library_of(y).traced(y))
    assert seen == [True] * 5
    negated = KINDS["tag of a negated"](x)
    assert library_of(negated).host_values(negated).sum() == 6
