"""One token after another: states in place, packed, shared; each against the core in float64."""

import functools
import itertools

import numpy as np
import pytest
from conftest import OPERATORS, budget, draw, installed, load
from devices import (
    STREAMING,
    accelerated,
    bits,
    each,
    gate_of,
    host,
    inputs_of,
    measured,
    of_torch,
    per_device,
    poison_empty,
    rounded,
    state_of,
)

import hla

H = 3
CASES = [*itertools.product(OPERATORS, STREAMING)]


@pytest.fixture(autouse=True)
def poison_torch(monkeypatch):
    poison_empty(monkeypatch, "torch")


def token_of(gate="none", dtype="float32", seed=1, **size):
    """Arrays of one token, and of a log gate the number that is not -inf."""
    inputs = inputs_of(1, dtype=dtype, positive=True, heads=H, seed=seed, **size)
    inputs = {n: x[:, 0] for n, x in inputs.items()}
    if gate == "resets":
        return inputs | {"log_gate": rounded(np.array([-0.3, -np.inf, 0.0]))}
    return inputs | gate_of(gate, 1, H)


def step(token, state, **options):
    q, k, v, *_ = token.values()
    gate = {n: x for n, x in token.items() if n not in "qkv"}
    return hla.step(q, k, v, state, **gate, **options)


def unpacked(state):
    return state.unpack() if hasattr(state, "unpack") else state


def within(got, want, dtype, D):
    """Assert (o, state) within the budget of a token: that of one chunk."""
    (o, state), (p, end) = got, want
    names = ["o", *end._fields]
    for name, x, y in zip(names, (o, *unpacked(state)), (p, *end), strict=True):
        x, y = host(x), host(y)
        if name[0].islower():
            x, y = x[..., None], y[..., None]
        allowed = budget(dtype if name == "o" else "float32", D=D, T=1)
        for error, most in zip(measured(x, y), allowed, strict=True):
            assert error <= most, f"{name}: error {error:.2e}, allowed {most:.2e}"


@per_device(
    "operator, mask, gate",
    lambda device: [
        (operator, mask, gate)
        for operator, mask in CASES
        for gate in (("none", "per_head", "resets") if mask == "causal" else ("per_head",))
    ],
    where=of_torch,
)
def test_tokens_within_the_budget(device, operator, mask, gate):
    """From a state and from none, plain and as a quotient, packed or not, in place or beside."""
    for dtype in device.dtypes if gate == "per_head" else (device.dtype,):
        D, V = device.widths["D"], device.widths["V"] if dtype == "float32" else 128  # to round
        token = token_of(gate, dtype, D=D, V=V)
        arrays = {n: device.array(x, dtype if n in "qkv" else "float32") for n, x in token.items()}
        for normalize, packed, donate in itertools.product([False, True], repeat=3):
            options = {"operator": operator, "mask": mask, "normalize": normalize}
            options["scale"] = 0.1 if dtype == "float16" else 0.2  # holds less than 65520
            if operator == "hla2" and normalize and mask == "causal":
                options["ridge"] = 0.25
            start = state_of(options, gate, D=D, V=V, heads=H, positive=True)
            for state in (start, None)[: 1 + (not packed and not donate)]:
                want = step(token, state, backend="array_api", **options)
                own = None if state is None else device.array(state)
                own = own.pack() if packed else own
                kept = None if state is None else type(own)(*(x.clone() for x in own))
                got = step(arrays, own, backend=device.backend, donate=donate, **options)
                within(got, want, dtype, D)
                if state is None:
                    continue
                same = [x is y for x, y in zip(got[1], own, strict=True)]
                assert all(same) if donate and takes(options) else not any(same)
                if not donate:
                    bits(own, kept)


def takes(options):
    """Whether a device has a kernel of one token for a program: no two passes share a state."""
    return options["mask"] == "causal" or not options.get("ridge")


def stepped(device, inputs, state, **options):
    return step(each_array(device, inputs), state, backend=device.backend, **options)


def each_array(device, token):
    return {n: device.array(x, device.dtype if n in "qkv" else "float32") for n, x in token.items()}


@per_device("operator", OPERATORS, where=lambda x: of_torch(x) and accelerated(x))
def test_a_full_device(device, operator):
    """Many heads of the widest tiles, in place, packed and not, again and again to the bit."""
    D, heads = 128, 600
    inputs = inputs_of(3, "per_head", device.dtype, D=D, V=D, heads=heads)
    decay = inputs.pop("decay")
    options = {"operator": operator, "scale": 0.1, "backend": "array_api"}
    first = [x[:, :2] for x in inputs.values()]
    _, start = hla.scan(*first, decay=decay, return_state=True, **options)
    start, token = rounded(start), {n: x[:, 2] for n, x in inputs.items()}
    want = step(token | {"decay": decay}, start, **options)
    given = {n: device.array(x, device.dtype) for n, x in token.items()}
    given["decay"] = device.array(decay)
    for packed in (False, True):
        found = []
        for _ in range(3):
            own = device.array(start)
            own = own.pack() if packed else own
            got = step(given, own, donate=True, **options | {"backend": device.backend})
            within(got, want, device.dtype, D)
            found.append(got)
        bits(found[1], found[0])
        bits(found[2], found[0])


@per_device("D, V", [(128, 128), (100, 60), (64, 20), (33, 11)], where=of_torch)
def test_programs_that_share_a_head_give_its_bits(device, D, V, monkeypatch):
    """One program a head, two, four: the rule is of the number of heads, and of wide keys."""
    from hla import again
    from hla.kernels.triton import step as launches

    token, found = token_of("per_head", device.dtype, D=D, V=V), []
    start = device.array(state_of({"operator": "hla2"}, "per_head", D=D, V=V, heads=H))
    for processors in (1, 2 * H, 132):
        monkeypatch.setattr(again, "_kept", {})
        monkeypatch.setattr(launches, "_known", {})
        monkeypatch.setattr(launches, "processors", lambda device, n=processors: n)
        found.append(stepped(device, token, start, normalize=True))
        (known,) = launches._known.values()
        kernels = known.ready[False].kernels
        assert len(kernels) == 1 + (processors > 1 and D > 64)
    for one in found[1:]:
        bits(one, found[0])


@per_device("operator", OPERATORS, where=of_torch)
@pytest.mark.parametrize("packed", [False, True])
def test_queries_that_share_keys_share_a_state(device, operator, packed):
    """In place too; q, k, v and the states of any strides."""
    D, V = device.widths["D"], device.widths["V"]
    D -= D % 2
    q, k, v = (rounded(x[:, 0], device.dtype) for x in draw(2 * H, 1, D=D, V=V, positive=True))
    q, k, v = q.reshape(2, H, D), k[:2, None], v[:2, None]
    past = draw(2 * H, 4, D=D, V=V)
    past = past[0].reshape(2, H, 4, D), past[1][:2, None], past[2][:2, None]
    start = rounded(hla.scan(*past, operator=operator, return_state=True)[1])
    options = {"operator": operator, "decay": 0.5, "normalize": True}
    want = hla.step(q, k, v, start, backend="array_api", **options)
    q, k, v = (device.array(x, device.dtype) for x in (q, k, v))
    q = q.mT.clone().mT  # features apart in memory
    turned = each(lambda x: x.mT.clone().mT if x.ndim > 3 else x, device.array(start))
    turned = turned.pack() if packed else turned
    for donate in (False, True):
        got = hla.step(q, k, v, turned, backend=device.backend, donate=donate, **options)
        within(got, want, device.dtype, D)
        assert [x is y for x, y in zip(got[1], turned, strict=True)] == [donate] * len(turned)


@per_device("kind", ["broadcast", "one memory", "memory of q", "learns", "wide"], where=of_torch)
def test_what_cannot_be_updated_is_left_alone(device, kind):
    import torch

    D = 136 if kind == "wide" else 16
    token = token_of(D=D, V=D)
    token = {n: device.array(x) for n, x in token.items()}
    state = device.array(state_of({"operator": "hla2"}, "none", D=D, V=D, heads=H))
    if kind == "broadcast":
        state = state._replace(S=state.S[:1].expand(H, D, D))
    elif kind == "one memory":
        state = state._replace(F=state.S)
    elif kind == "memory of q":
        state = state._replace(eta=token["q"])
    elif kind == "learns":
        state = state._replace(F=state.F.requires_grad_())
    kept = each(lambda x: x.detach().clone(), state)
    for backend in (device.backend, "array_api"):
        with torch.no_grad():
            want, end = step(token, state, backend="array_api")
            o, after = step(token, state, backend=backend, donate=True)
        for x, y in zip((o, *unpacked(after)), (want, *unpacked(end)), strict=True):
            assert np.linalg.norm(host(x) - host(y)) < 1e-5 * np.linalg.norm(host(y))
        if not (kind == "wide" and backend == "array_api"):
            bits(each(torch.Tensor.detach, state), kept)


@pytest.mark.parametrize("gate", ["none", "per_head", "resets"])
@pytest.mark.parametrize(("operator", "mask"), CASES)
def test_torch_updates_a_donated_state_where_it_lies(operator, mask, gate):
    """By its own operations; a state that autograd has saved is known to have changed."""
    torch = installed("torch")
    lib = load("torch")
    token = {n: lib.array(x, "float64") for n, x in token_of(gate, D=8, V=5).items()}
    options = {"operator": operator, "mask": mask, "backend": "array_api", "normalize": True}
    start = state_of({"operator": operator, "mask": mask}, gate, D=8, V=5, heads=H)
    state = each(lambda x: lib.array(x, "float64"), start)
    mine = each(torch.clone, state)
    learning = token["q"].clone().requires_grad_()
    product = (learning[..., None] * mine[0]).sum()
    for _ in range(3):
        want, state = step(token, state, **options)
        o, after = step(token, mine, donate=True, **options)
        assert all(x is y for x, y in zip(after, mine, strict=True))
        for x, y in zip((o, *mine), (want, *state), strict=True):
            torch.testing.assert_close(x, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@per_device("operator", ["hla2", "hla3"], where=of_torch)
def test_explain_names_the_kernel_of_a_token(device, operator, monkeypatch):
    from hla import again
    from hla.kernels.triton import step as launches

    monkeypatch.setattr(again, "_kept", {})
    monkeypatch.setattr(launches, "_known", {})
    token, options = token_of(D=16, V=16), {"operator": operator}
    stepped(device, token, device.array(state_of(options, "none", D=16, V=16, heads=H)), **options)
    (known,) = launches._known.values()
    name = known.ready[False].kernels[0].function.fn.__name__
    q, k, v = (device.array(x, device.dtype)[:, None] for x in token.values())
    plan = hla.explain(q, k, v, backend=device.backend, **options).plan
    assert plan.split("; one token: ")[1].startswith(name)
    assert "one token" not in hla.explain(q, k, v, backend=device.backend, mask="none").plan


@per_device(where=of_torch)
def test_calls_like_an_earlier_one(device):
    """The values are those of a first call, and whatever differs is noticed."""
    torch, kept = installed("torch"), installed("hla.again")._kept
    token = {n: device.array(x) for n, x in token_of(D=16, V=16).items()}
    state = device.array(state_of({"operator": "hla2"}, "none", D=16, V=16, heads=H))
    packed = each(torch.clone, state).pack()
    kept.clear()
    for n, (start, options) in enumerate(
        [(state, {}), (state, {"decay": 0.5}), (state, {"decay": 0.9}), (packed, {"scale": 2.0}),
         (None, {"normalize": True})]
    ):  # fmt: skip
        found = []
        for _ in range(3):
            own = start if start is None else each(torch.clone, start)
            found.append(step(token, own, backend=device.backend, donate=True, **options))
            assert own is None or all(x is y for x, y in zip(found[-1][1], own, strict=True))
        bits(found[1], found[0])
        bits(found[2], found[0])
        assert len(kept) == n + 1
    run = functools.partial(step, backend=device.backend, donate=True)
    with pytest.raises(ValueError, match="decay is 2"):
        run(token, state, decay=2.0)
    with pytest.raises(TypeError, match="normalize is 1"):
        run(token, None, normalize=1)
    learning = token | {"q": token["q"].clone().requires_grad_()}
    assert run(learning, state)[0].requires_grad
    before = each(torch.clone, state)
    run(token, state._replace(eta=state.F[0, :H]))  # one memory
    bits(state, before)
    turned = torch.func.vmap(lambda q: run(token | {"q": q}, None, normalize=True)[0])
    within = turned(token["q"][None])[0] - run(token, None, normalize=True)[0]
    assert float(abs(within).max()) < 1e-5


@per_device(where=of_torch)
def test_autograd_knows_what_a_kernel_has_changed(device):
    token = {n: device.array(x) for n, x in token_of(D=16, V=16).items()}
    state = device.array(state_of({"operator": "hla2"}, "none", D=16, V=16, heads=H))
    learning = token["q"].clone().requires_grad_()
    product = (learning[..., None] * state.S).sum()
    step(token, state, backend=device.backend, donate=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
