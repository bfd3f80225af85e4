"""Calls of `hla.scan` like an earlier one: to the bit what a first call gives, else noticed."""

import functools
import itertools

import numpy as np
import pytest
from conftest import draw, installed, rows
from devices import bits, of_torch, per_device

import hla

T, H = 5, 2


@pytest.fixture
def kept(monkeypatch):
    """What is kept, nothing at first; decays that the host could check are taken as on a GPU."""
    installed("torch")
    again, library = installed("hla.again"), installed("hla.libraries.torch")
    monkeypatch.setattr(library.Torch, "on_accelerator", lambda self, x: True)
    monkeypatch.setattr(again, "_kept", {})
    return again


def drawn(device, *shape):
    torch = installed("torch")
    torch.manual_seed(0)
    q, k, v, do = torch.rand((4, *shape), device=device.array([0.0]).device)
    return [x.to(getattr(torch, device.dtype)) / 4 for x in (q, k, v, do)]


def everything(call, leaves):
    """Results of a call, and their gradients with respect to the leaves that learn."""
    torch = installed("torch")
    o, *state = call() if isinstance(call(), tuple) else (call(),)
    flat = [o, *(state[0] if state else ())]
    learning = [x for x in leaves if x.requires_grad]
    if not learning:
        return flat
    dos = [torch.linspace(-1, 1, x.numel(), device=x.device).reshape(x.shape) for x in flat]
    dos = [do.to(x.dtype) for do, x in zip(dos, flat, strict=True)]
    return [*flat, *torch.autograd.grad(flat, learning, dos)]


def same_bits(got, want):
    for x, y in zip(got, want, strict=True):
        bits(x.detach(), y.detach())


GATES = ("none", "number", "decay", "log_gate")
KINDS = [*itertools.product((-2, -3), GATES, (False, True), (0, 3, 4))]


@per_device("axis, gate, states, learn", KINDS[::5], where=of_torch)
def test_values_and_layouts_are_those_of_a_first_call(device, axis, gate, states, learn, kept):
    """q, k and v learn, or the gate and the initial state too."""
    torch = installed("torch")
    shape = (1, T, H, 16) if axis == -3 else (1, H, T, 16)
    *leaves, _ = drawn(device, *shape)
    options = {"axis": axis, "return_state": states, "backend": device.backend}
    if gate == "number":
        options["decay"] = 0.5
    elif gate != "none":
        x = torch.rand(H if gate == "decay" else shape[:-1], device=leaves[0].device)
        options[gate] = 0.5 + x / 2 if gate == "decay" else -x
        leaves.append(options[gate])
    if states:
        _, state = hla.scan(*leaves[:3], **options)
        options["initial_state"] = type(state)(*(x.clone() for x in state))
        leaves += options["initial_state"]
    for x in leaves[: 3 if learn == 3 else None] if learn else ():
        x.requires_grad_()
    call = functools.partial(hla.scan, *leaves[:3], **options)
    with pytest.MonkeyPatch.context() as first:
        first.setattr(kept, "seen", lambda *args: None)
        want = everything(call, leaves)
    kept._kept.clear()
    for _ in range(3):
        got = everything(call, leaves)
        same_bits(got, want)
        assert [x.stride() for x in got] == [x.stride() for x in want]
        assert len(kept._kept) == 1
    (several,) = kept._kept.values()
    assert len(several) == 1


CHANGES = {
    "strides": lambda torch, x: x.mT.contiguous().mT,
    "dtype": lambda torch, x: x.double(),
    "alignment": lambda torch, x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "shape": lambda torch, x: x[:, :1],
    "learns": lambda torch, x: x.clone().requires_grad_(),
    "parameter": lambda torch, x: torch.nn.Parameter(x.clone(), requires_grad=False),
    "a pending sign": lambda torch, x: torch.complex(-x, x).conj().imag,
    "zeros not in memory": lambda torch, x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "meta": lambda torch, x: x.to("meta"),
    "sparse": lambda torch, x: x.to_sparse(),
    "one tensor twice": lambda torch, x: None,
    "no tensor": lambda torch, x: x.tolist(),
}
MODES = {
    "autocast": lambda torch, x: torch.autocast(x.device.type, torch.bfloat16),
    "inference": lambda torch, x: torch.inference_mode(),
    "forward mode": lambda torch, x: torch.autograd.forward_ad.dual_level(),
    "a dispatch mode": lambda torch, x: installed(
        "torch.utils.flop_counter"
    ).FlopCounterMode(display=False),
    "fakes": lambda torch, x: installed("torch._subclasses.fake_tensor").FakeTensorMode(),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_another_tensor_is_not_alike(change):
    torch, alike = installed("torch"), installed("hla.libraries.torch_alike").alike
    x, *others = torch.rand(4, 1, 3, 4)
    same = alike([x, *others])
    assert same([x, *others]) == [y.data_ptr() for y in (x, *others)]
    assert same([x.clone(), *others])
    changed = CHANGES[change](torch, x)
    changed = others[0] if changed is None else changed
    assert same([changed, *others]) is None
    if change not in ("strides", "dtype", "alignment", "shape", "learns", "parameter"):
        assert alike([changed, *others]) is None
    assert alike([hla_subclass(torch)(x), *others]) is None


def hla_subclass(torch):
    return type("Own", (torch.Tensor,), {})


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_noticed(mode):
    torch, alike = installed("torch"), installed("hla.libraries.torch_alike").alike
    arrays = [*torch.rand(3, 3, 4)]
    same = alike(arrays)
    with MODES[mode](torch, arrays[0]):
        assert same(arrays) is None
        if mode != "inference":
            assert alike(arrays) is None
    assert same(arrays)


def test_transforms_traces_grad_mode_and_precision_are_noticed():
    torch, alike = installed("torch"), installed("hla.libraries.torch_alike").alike
    arrays, asked = [*torch.rand(3, 3, 4)], []
    same = alike(arrays)

    def ask(x):
        asked.append((same(arrays), alike(arrays)))
        return (x * 1).sum()

    torch.func.vmap(ask)(arrays[0])
    torch.func.grad(ask)(arrays[0])
    torch.func.jvp(ask, (arrays[0],), (arrays[0],))
    torch.func.functionalize(ask)(arrays[0])
    torch.jit.trace(ask, (arrays[0],), check_trace=False)
    assert asked == [(None, None)] * len(asked)
    assert len(asked) >= 5
    arrays[0].requires_grad_()
    same = alike(arrays)
    with torch.no_grad():
        assert same(arrays) is None
    assert same(arrays)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert same(arrays) is None
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@per_device(where=of_torch)
def test_what_a_gradient_may_come_as(device, kept):
    """Broadcast, of other strides, missing, differentiable: each as without anything kept."""
    torch = installed("torch")
    *leaves, do = drawn(device, 1, T, H, 16)
    for x in leaves:
        x.requires_grad_()
    call = functools.partial(
        hla.scan, *leaves, axis=-3, return_state=True, decay=0.5, backend=device.backend
    )

    def pulled(seen):
        with pytest.MonkeyPatch.context() as context:
            context.setattr(kept, "seen", seen)
            found = []
            for _ in range(2):
                o, state = call()
                found += torch.autograd.grad(o.sum(), leaves)
                found += torch.autograd.grad(call()[0], leaves, do.mT.contiguous().mT)
                found += torch.autograd.grad(call()[1].F.sum(), leaves)
                o, state = call()
                found += torch.autograd.grad([o, *state], leaves[:2], [do, *state])
                with torch.autograd.graph.save_on_cpu():
                    o, _ = call()
                found += torch.autograd.grad(o, leaves, do)
                first = torch.autograd.grad(call()[0].square().sum(), leaves, create_graph=True)
                found += torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
        return found

    same_bits(pulled(kept.seen), pulled(lambda *args: None))


@per_device("operator", ("linear", "hla2"), where=of_torch)
def test_a_packed_state_stays_packed(device, operator, kept):
    """Also one without S, of which a packed state has the same arrays."""
    *leaves, _ = drawn(device, 1, H, T, 16)
    options = {"operator": operator, "backend": device.backend, "return_state": True}
    _, state = hla.scan(*leaves, **options)
    packed = state.pack()
    for _ in range(3):
        assert type(hla.scan(*leaves, **options, initial_state=packed)[1]) is type(packed)
        (o, end), pullback = hla.vjp(*leaves, **options, initial_state=packed)
        assert type(end) is type(pullback(o, end).dinitial_state) is type(packed)


@per_device(where=of_torch)
def test_a_checkpoint_runs_a_first_and_a_later_call(device, kept):
    """Both must save the same tensors."""
    torch = installed("torch")
    *leaves, do = drawn(device, 1, T, H, 16)
    for x in leaves:
        x.requires_grad_()
    call = functools.partial(hla.scan, axis=-3, backend=device.backend)
    want = torch.autograd.grad(call(*leaves), leaves, do)
    kept._kept.clear()
    o = torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=False)
    same_bits(torch.autograd.grad(o, leaves, do), want)


@per_device(where=of_torch)
def test_no_more_than_some_are_kept(device, kept, monkeypatch):
    monkeypatch.setattr(kept, "MOST", 3)
    monkeypatch.setattr(kept, "SEVERAL", 2)
    q, k, v, _ = drawn(device, 1, 2, 3, 16)
    for scale in range(1, 9):
        hla.scan(q, k, v, scale=float(scale), backend=device.backend)
        assert len(kept._kept) <= 3
    for x in (k, k.mT.contiguous().mT, k.flip(0).clone(), k[:, :1]):
        hla.scan(q, x, v, backend=device.backend)
        assert all(len(several) <= 2 for several in kept._kept.values())


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("gate", ["none", "number"])
@pytest.mark.parametrize("row", rows(("hla2",), ("causal",), ("chunked",)))
def test_tokens_of_numpy_are_taken_again(row, gate, donate, monkeypatch):
    """To the bit what a first call gives; arrays of other strides or dtypes are not alike."""
    again = installed("hla.again")
    monkeypatch.setattr(again, "_kept", {})
    options = {"backend": row.backend, "donate": donate}
    hla.step(*(x[0] for x in draw(6, 3)), backend=[row.backend])  # no array, and not compared
    assert not again._kept
    options |= {"decay": 0.5} if gate == "number" else {}
    q, k, v = draw(6, 3)

    def steps(*arrays):
        state, found = None, []
        for q, k, v in zip(*arrays, strict=True):
            o, state = hla.step(q, k, v, state, **options)
            found += [o, *(x.copy() for x in state)]
        return found

    narrow = [x.astype("float32") for x in (q, k, v)]
    strided = [x.repeat(2, -1)[..., ::2] for x in (q, k, v)]
    unaligned = [np.ndarray(x.shape, x.dtype, b" " + x.tobytes(), 1) for x in (q, k, v)]
    for arrays in ((q, k, v), strided, unaligned, narrow, (q, k, v)):
        with monkeypatch.context() as first:
            first.setattr(again, "seen", lambda *args: None)
            want = steps(*arrays)
        bits(tuple(steps(*arrays)), tuple(want))
    assert bool(again._kept) == (row.backend != "array_api")
