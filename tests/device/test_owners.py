"""Plans whose fused forward runs by two state owners on Hopper, its kernel interpreted."""

import fakes
import numpy as np
import pytest
from conftest import installed

import hla
from hla.arguments import prepare
from hla.device.scan import Runner
from hla.device.steps import Fused, Limits

installed("triton")
installed("torch")
gluon_interpreter = installed("gluon_interpreter")
owners = installed("hla.kernels.triton.owners")
rows = installed("hla.kernels.triton.rows")

FAKE = fakes.in_place(Limits(chunk=2, period=4)).device
CLOSE = 1e-6  # weights are float32
ran, divided = [], []


def step_of(call, step):
    """Do a step of a plan as Triton would; its fused kernels, in Gluon, interpreted."""
    if not isinstance(step, Fused):
        return FAKE.steps(call, step)
    (kernel,) = rows.KERNELS[step.row](call, step)
    kernel = getattr(kernel, "aligned", kernel)

    def do(arrays, addresses, stream):
        ran.append(step.row)
        given = [None if x is None else arrays[x.slot] for x in kernel.operands]
        divided.append(step.divide)
        placed = [
            None if x is None else placed_at(x, at)
            for x, at in zip(given, kernel.operands, strict=True)
        ]
        constants = dict(kernel.constants)
        if not step.divide:  # else what is left is stored as bfloat16 would be
            constants["WIDE"] = True
        gluon_interpreter.run(
            kernel.function, kernel.grid, *placed, *kernel.scalars, exact=True, **constants
        )

    return [do]


def placed_at(x, place):
    """The view of an array from the first element of an operand on."""
    return np.lib.stride_tricks.as_strided(
        x, place.layout.shape, [8 * n for n in place.layout.strides]
    )


def off(x, want):
    """Error relative to what is wanted."""
    return np.linalg.norm(x - want) / np.linalg.norm(want)


PLANNED = Runner(FAKE._replace(steps=step_of, rows=lambda request, where: owners.rows(request)))


@pytest.mark.parametrize("options", [
    {}, {"operator": "ahla"}, {"gate": "decay"}, {"gate": "log_gate", "operator": "ahla"},
    {"normalize": True, "shared": "qk"}, {"D": 40, "ridge": 0.3},
    {"scale": 0.5, "return_state": True},
    {"return_state": True, "start": True, "gate": "decay"}, {"turned": True}, {"shared": "kv"},
    {"tokens": 68, "return_state": True, "start": True, "gate": "log_gate"},
    {"tokens": 36, "operator": "ahla", "gate": "decay", "shared": "kv"},
    {"gradient": False}, {"operator": "hla3", "normalize": True, "turned": True},
    {"operator": "hla3", "normalize": True, "gradient": False, "scale": 0.7, "return_state": True},
    {"operator": "hla3", "gate": "log_gate", "D": 40, "return_state": True},
    {"operator": "hla3", "start": True, "return_state": True, "scale": 0.7, "shared": "k"},
    {"operator": "hla3", "tokens": 36, "return_state": True, "gate": "decay"},
    {"normalize": True, "gate": "log_gate", "gradient": False, "D": 40, "return_state": True},
    {"normalize": True, "tokens": 36, "scale": 0.5, "start": True, "return_state": True},
    {"normalize": True, "operator": "ahla", "gate": "decay", "tokens": 36, "gradient": False},
    {"normalize": True, "operator": "ahla", "start": True, "return_state": True, "scale": 0.7},
    {"normalize": True, "operator": "hla3", "gate": "log_gate", "tokens": 36, "gradient": False},
    {"normalize": True, "ridge": 0.3},
], ids=str)  # fmt: skip
def test_planned(options):
    """What a call asks for is what the kernel is told, whatever the shapes and strides."""
    given = {"operator": "hla2", "gate": None, "D": 72, "start": False, "turned": False,
             "shared": "", "normalize": False, "return_state": False, "gradient": True,
             "tokens": 0} | options  # fmt: skip
    random = np.random.default_rng(0)
    gate, D, start, turned, shared, gradient, tokens = (
        given.pop(n) for n in ("gate", "D", "start", "turned", "shared", "gradient", "tokens")
    )
    T, V, batch = 70, 128 if D == 40 else 24, (2, 2)
    arrays = {}
    for name, n in zip("qkv", (D, D, V), strict=True):
        lead = (2, 1) if name in shared else batch
        x = abs(random.normal(size=(*lead, T, n))) / n**0.5
        arrays[name] = np.moveaxis(np.moveaxis(x, 1, 2).copy(), 2, 1) if turned else x
    if gate == "decay":
        arrays["decay"] = random.uniform(0.9, 1, 2)
    elif gate:
        arrays["log_gate"] = -random.exponential(0.1, (*batch, T))
    if start:
        _, state = hla.scan(**arrays, **given)
        arrays["initial_state"] = state
    names = {"decay": None, "log_gate": None, "scale": 1.0, "mask": "causal"} | arrays | given
    request, inputs, _ = prepare(**names, gradient=gradient)
    ran.clear()
    divided.clear()
    o, state, saved = PLANNED.forward(request, inputs, tokens)
    assert len(ran) == (2 if tokens else 1)
    want = hla.scan(**arrays, **given)
    want, states = want if given["return_state"] else (want, ())
    assert off(o, want) < CLOSE
    for x, y in zip(state or (), states, strict=True):
        assert off(x, y) < CLOSE
    for x, y in zip(saved, fakes.in_place().forward(request, inputs)[2], strict=True):
        assert off(x, y) < CLOSE
    other = given["operator"] != "hla2"
    apart = "ridge" in given or (other and tokens) or (given["operator"] == "hla3" and gradient)
    assert bool(divided[-1]) == (given["normalize"] and not apart)


def test_what_it_serves():
    q = np.ones((2, 3, 5, 100))
    names = {"decay": None, "log_gate": None, "scale": 1.0, "q": q, "k": q}

    def served(v=q, **options):
        given = names | {"v": v, "operator": "hla2", "mask": "causal"} | options
        return list(dict.fromkeys(x.name for x in owners.rows(prepare(**given, gradient=False)[0])))

    assert served() == ["hla2 by two state owners"]
    assert served(operator="ahla", normalize=True) == ["ahla by two state owners"]
    assert served(v=q[..., :8], ridge=0.1) == ["hla2 by two state owners"]
    wide = np.ones((2, 3, 5, 129))
    assert served(operator="hla3") == ["hla3 by two state owners"]
    for other in (
        {"mask": "prefix"}, {"operator": "linear"}, {"v": wide},
        {"convention": "paper", "decay": 0.5},
    ):  # fmt: skip
        assert served(**other) == []
    small = q[..., :64]
    assert served(v=small, q=small, k=small) == ["hla2 by two state owners"]


def test_where_it_runs(monkeypatch):
    """On Hopper, of bfloat16, by a Triton whose Gluon is known."""
    torch, triton = installed("torch"), installed("triton")
    q = torch.ones(2, 5, 100, dtype=torch.bfloat16)
    names = {"decay": None, "log_gate": None, "scale": 1.0, "operator": "ahla", "mask": "causal"}
    request = prepare(q=q, k=q, v=q, **names, gradient=False)[0]
    wide = prepare(q=q.float(), k=q.float(), v=q.float(), **names, gradient=False)[0]
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(owners, "capability", lambda where: 9)
    for version, able in (("3.5.1", False), ("3.6.0+git1", True), ("3.9.0", True), ("3.10", False)):
        monkeypatch.setattr(triton, "__version__", version)
        assert owners.able(request, cuda) == able
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    assert not owners.able(request, torch.device("cpu"))
    assert not owners.able(wide, cuda)
    monkeypatch.setattr(owners, "capability", lambda where: 8)
    assert not owners.able(request, cuda)
