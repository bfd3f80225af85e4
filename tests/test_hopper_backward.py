"""The sweeps of adjoints on Hopper, interpreted: against core in float64.

Exact, every float a float64, errors are those of the algebra; in bfloat16 they are roundings.
"""

import collections
import dataclasses
import importlib
import types

import ml_dtypes
import numpy as np
import pytest
from conftest import EXACT, installed, rms, within_budget
from device.fakes import results

installed("triton")
torch = installed("torch")
import gluon_interpreter  # noqa: E402
from terms import gates_within_budget  # noqa: E402
from test_kernels import named, safe  # noqa: E402
from triton_interpreter import hasten  # noqa: E402

import hla  # noqa: E402
from hla.arguments import prepare  # noqa: E402
from hla.device import plan, scan, shapes  # noqa: E402
from hla.device.elementwise import gate_of, part, taking  # noqa: E402
from hla.device.scan import Call, Kind, Ready, Runner  # noqa: E402
from hla.device.steps import Carry, Fused, GateGradient, Launch, Ref, Skew  # noqa: E402
from hla.device.tiles import Layout  # noqa: E402
from hla.kernels.triton import hopper_backward, launch, run  # noqa: E402
from hla.states import AHLAState, HLA2State, HLA3State, LinearState  # noqa: E402

CUDA = torch.device("cuda")
H = 2
hasten()


class Interpreted:
    """A Gluon kernel on tensors of the host."""

    def __init__(self, kernel, exact, seed):
        self.kernel, self.exact, self.seed, self.ran = kernel, exact, seed, []

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.ran.append(constants)
            given = [at(x) if isinstance(x, torch.Tensor) else x for x in args]
            gluon_interpreter.run(
                self.kernel, grid, *given, seed=self.seed, exact=self.exact, **constants
            )

        return launch


def at(x):
    """Where a tensor begins, in its memory as a NumPy array."""
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    if x.dtype != torch.bfloat16:
        return gluon_interpreter.At(whole.numpy(), x.storage_offset())
    flat = whole.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return gluon_interpreter.At(flat, x.storage_offset())


@pytest.fixture
def kernels(monkeypatch):
    """Kernels of both sweeps, interpreted; exact or not."""

    def use(exact, seed=0):
        found = []
        for name in ("reverse", "queries", "ahla"):
            module = importlib.import_module(f"hla.kernels.triton.hopper_{name}")
            found.append(Interpreted(getattr(module, f"{name}_kernel"), exact, seed))
            monkeypatch.setattr(module, f"{name}_kernel", found[-1])
        return found

    return use


def rows(request, where):
    """The rows of a request on an H100, also of float64."""
    return hopper_backward.rows(request)


def steps(call, step):
    """The steps of a plan, passes in float64: Triton's interpreter multiplies no bfloat16."""
    if not isinstance(step, Launch):
        return run.steps(call, step)

    def do(arrays, addresses, stream):
        same = [x if x is None else x.double().numpy() for x in arrays]
        made = results(np, step, launch.WIDE, taking(call, same), gate_of(call, same))
        for ref, x in made:
            part(arrays[call.slots[ref.name]], ref)[...] = torch.tensor(x)

    return [do]


def gates(rng, gate, lead, T):
    """The arguments of a gate: none, a number that has no gradient, one a head, one a token."""
    if gate == "per_head":
        return {"decay": rng.uniform(0.8, 1.0, size=lead)}
    if gate == "decay":
        return {"decay": 0.93}
    if gate == "log_gate":
        a = -rng.uniform(0, 0.3, size=(*lead, T))
        a[..., T // 3] = -np.inf
        return {"log_gate": a}
    return {}


def given(rng, T, D, V, lead=(H,), keys=None):
    """Arrays of unit size; keys may be shared."""
    sizes = {"q": (lead, D), "k": (keys or lead, D), "v": (lead, V), "do": (lead, V)}
    return {n: rng.standard_normal((*b, T, w)) * w**-0.25 for n, (b, w) in sizes.items()}


def gradients(
    arrays, options, dtype, start=None, layout=None, operator="hla2", tokens=0, trained=False,
    last=None,
):  # fmt: skip
    """Those of the sweeps, and of the core in float64 by the same rounded arrays.

    ``last`` are gradients of the last state; there is a first one then.
    """
    place = layout or (lambda x: x)
    tensors = {n: place(torch.tensor(x).to(dtype)) for n, x in arrays.items()}
    exact = {n: x.double().numpy() for n, x in tensors.items()}
    do, truth = exact.pop("do"), dict(exact)
    inputs = {n: tensors[n] for n in "qkv"} | {
        n: torch.tensor(x) for n, x in options.items() if np.ndim(x)
    }
    plain = {"decay": options.get("decay"), "log_gate": None, "scale": options["scale"]}
    if start is not None:
        inputs["initial_state"] = truth["initial_state"] = start
        inputs["initial_state"] = type(start)(*map(torch.tensor, start))
    returns = {"return_state": last is not None}
    request, made, _ = prepare(**plain | inputs, **returns, operator=operator, gradient=True)
    request = dataclasses.replace(request, gate_given=trained)
    same = {n: options[n] for n in ("decay", "log_gate", "scale") if n in options}
    _, pull = hla.vjp(**truth, **returns, **same, operator=operator, backend="array_api")
    want, saved = pull(do) if last is None else pull(do, last), []
    for name in shapes.saved(request):
        matrix, values = SAVED[name]
        S = getattr(start, matrix, None)
        S = S[..., None] if matrix == "m" and S is not None else S
        S = None if S is None else LinearState(S, np.zeros(S.shape[:-1]))
        v = exact.get(values, np.ones((*exact["q"].shape[:-1], 1)))
        made_of = exact["q"], exact["k"], v
        x = hla.scan(*made_of, operator="linear", initial_state=S, **same)
        saved.append(torch.tensor(x).to(dtype))
    device = Runner(run.RUNNER.device._replace(rows=rows, steps=steps))
    last = last and type(last)(*map(torch.tensor, last))
    return device.backward(request, made, saved, tensors["do"], last, tokens), want


def close(got, want, most=EXACT):
    assert rms(got.double().numpy() - want) <= most * rms(want)


SAVED = {"y": "Sk", "u": "Pv", "u|1": "m1"}  # their states and values
STATES_OF = {"hla2": HLA2State, "ahla": AHLAState, "hla3": HLA3State}
RUNS = {"hla2": [1, 1, 0], "ahla": [0, 1, 1], "hla3": [2, 2, 0]}  # how often each kernel runs
CASES = [  # operator, T, D, V, gate, whether there is a state
    ("hla2", 130, 64, 64, None, False),
    ("hla2", 200, 128, 128, "decay", True),
    ("hla2", 64, 128, 128, "log_gate", False),
    ("hla2", 67, 24, 40, "log_gate", True),
    ("hla2", 1, 128, 96, "decay", True),
    ("hla2", 70, 20, 100, None, False),  # rows of no whole 16 bytes
    ("ahla", 130, 64, 64, None, True),
    ("ahla", 200, 128, 128, "decay", False),
    ("ahla", 67, 24, 100, "log_gate", True),
    ("ahla", 65, 100, 20, None, False),
    ("hla3", 130, 64, 64, None, False),
    ("hla3", 200, 128, 128, "decay", True),
    ("hla3", 67, 24, 100, "log_gate", True),
    ("hla3", 130, 128, 64, None, True),
]


def first_state(rng, operator, D, V):
    """A state of an operator."""
    kind = STATES_OF[operator]
    matrices = {"S": (D, D), "F": (D, V), "P": (D, V), "E": (D, V)}
    return kind(*(rng.standard_normal((H, *matrices.get(n, (D,)))) for n in kind._fields))


@pytest.mark.parametrize(("operator", "D", "V", "gate", "states"), [
    ("hla2", 128, 64, None, False), ("hla2", 40, 128, "decay", True),
    ("hla2", 64, 64, "log_gate", True), ("ahla", 40, 64, "decay", True),
    ("hla3", 64, 40, "log_gate", True),
])  # fmt: skip
def test_segments(kernels, monkeypatch, operator, D, V, gate, states):
    """Three, the last short: of hla2 dy again for the states of Z, then the sweeps from states."""
    rng, T = np.random.default_rng(4), 170
    monkeypatch.setattr(run, "limits", lambda *call: launch.WIDE._replace(period=80))
    made = kernels(exact=True)
    options = {"scale": 0.5} | gates(rng, gate, (H,), T)
    start = first_state(rng, operator, D, V) if states else None
    arrays = given(rng, T, D, V)
    got, want = gradients(arrays, options, torch.float64, start, operator=operator, tokens=80)
    sweeps = [operator == "hla3", True]
    ran = [sweeps, [True] * RUNS[operator][1], []]
    if operator == "ahla":
        ran = [[], [True], [False, False, True] if states else [False, True]]
    assert [[x.get("READ", True) for x in kernel.ran] for kernel in made] == ran
    for name in ("dq", "dk", "dv"):
        close(getattr(got, name), getattr(want, name), most=1e-6)  # carried in float32
    if states:
        for x, y in zip(got.dinitial_state, want.dinitial_state, strict=True):
            close(x, y, most=1e-6)


@pytest.mark.parametrize(("operator", "T", "D", "V", "gate", "states"), CASES)
def test_gradients_are_exact(kernels, operator, T, D, V, gate, states):
    rng = np.random.default_rng(T)
    made = kernels(exact=True, seed=T)
    options = {"scale": 0.5} | gates(rng, gate, (H,), T)
    start = first_state(rng, operator, D, V) if states else None
    arrays = given(rng, T, D, V)
    got, want = gradients(arrays, options, torch.float64, start, operator=operator)
    assert [len(kernel.ran) for kernel in made] == RUNS[operator]
    assert made[1].ran[0]["FAST"] == (D % 8 == V % 8 == 0)
    for name in ("dq", "dk", "dv"):
        close(getattr(got, name), getattr(want, name))
    for name in "SFPE" if states else "":
        if hasattr(start, name):  # S by a pass in float32
            x, y = (getattr(z.dinitial_state, name) for z in (got, want))
            close(x, y, most=1e-6 if name == "S" else EXACT)


@pytest.mark.parametrize(("operator", "gate"), [("ahla", None), ("hla3", "decay")])
def test_gradients_of_all_last_states(kernels, operator, gate):
    """Passes of the denominators' states leave some of d.q before a sweep adds to it."""
    rng = np.random.default_rng(5)
    made = kernels(exact=True)
    start, last = (
        type(S)(*(x.astype(np.float32) for x in S))  # as Triton's interpreter sums
        for S in (first_state(rng, operator, 64, 40) for _ in "ab")
    )
    options = {"scale": 0.5} | gates(rng, gate, (H,), 70)
    arrays = given(rng, 70, 64, 40)
    got, want = gradients(arrays, options, torch.float32, start, operator=operator, last=last)
    assert [len(kernel.ran) for kernel in made] == RUNS[operator]
    for name in ("dq", "dk", "dv"):
        close(getattr(got, name), getattr(want, name), most=1e-6)
    for x, y in zip(got.dinitial_state, want.dinitial_state, strict=True):
        close(x, y, most=1e-5)


@pytest.mark.parametrize(
    ("operator", "gate"), [("hla2", "log_gate"), ("ahla", None), ("hla3", None)]
)
def test_shared_keys_and_any_strides(kernels, operator, gate):
    """Gradients of keys that heads share are summed; tokens lie outside heads, features apart."""
    rng = np.random.default_rng(1)
    kernels(exact=True)
    options = {"scale": 1.0} | gates(rng, gate, (2, 1), 70)
    arrays = given(rng, 70, 32, 32, (2, 2), keys=(2, 1))
    for layout in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.mT.contiguous().mT,
    ):
        got, want = gradients(arrays, options, torch.float64, layout=layout, operator=operator)
        for name in ("dq", "dk", "dv"):
            close(getattr(got, name), getattr(want, name))


@pytest.mark.parametrize(
    ("operator", "gate"), [("hla2", "decay"), ("hla2", "log_gate"), ("ahla", None), ("hla3", None)]
)
def test_bfloat16(kernels, operator, gate):
    rng = np.random.default_rng(2)
    made = kernels(exact=False)
    options = {"scale": 1.0} | gates(rng, gate, (H,), 200)
    arrays = given(rng, 200, 128, 128)
    got, want = gradients(arrays, options, torch.bfloat16, operator=operator)
    assert [len(kernel.ran) for kernel in made] == RUNS[operator]
    for name in ("dq", "dk", "dv"):
        x, y = getattr(got, name).double().numpy(), getattr(want, name)
        within_budget(x, y, "bfloat16", D=128, operator=operator, gradient=True)


@pytest.mark.parametrize(("operator", "T", "D", "V", "gate", "states", "tokens", "dtype"), [
    ("hla2", 150, 128, 96, "log_gate", False, 0, "float64"),
    ("hla2", 200, 40, 24, "per_head", False, 128, "float64"),
    ("hla2", 60, 64, 64, "log_gate", False, 0, "float64"),
    ("ahla", 200, 24, 60, "log_gate", True, 128, "float64"),
    ("ahla", 130, 100, 128, "per_head", False, 0, "float64"),
    ("hla3", 150, 128, 96, "log_gate", False, 0, "float64"),
    ("hla3", 200, 40, 24, "per_head", False, 128, "float64"),
    ("hla2", 200, 128, 96, "log_gate", True, 0, "float64"),
    ("hla2", 200, 100, 24, "per_head", True, 128, "float64"),
    ("hla3", 200, 40, 24, "log_gate", True, 0, "float64"),
    ("hla3", 200, 128, 24, "per_head", True, 128, "float64"),
    ("hla2", 300, 128, 128, "log_gate", False, 0, "bfloat16"),
    ("ahla", 200, 128, 128, "per_head", False, 0, "bfloat16"),
])  # fmt: skip
def test_gradient_of_a_gate(kernels, monkeypatch, operator, T, D, V, gate, states, tokens, dtype):
    """In the sweeps, by the products of states before every chunk but the first; in segments.

    A first S is not symmetric, which later ones are; gates are so mild that it lasts.
    """
    monkeypatch.setattr(hopper_backward, "PERIOD", 64)
    rng, exact = np.random.default_rng(T), dtype == "float64"
    made = kernels(exact=exact, seed=T)
    options = {"scale": 0.5} | gates(rng, gate, (H,), T)
    if states and gate == "log_gate":
        options["log_gate"] *= 0.05
    elif states:
        options["decay"] **= 0.05
    start = first_state(rng, operator, D, V) if states else None
    arrays = given(rng, T, D, V)
    dt = getattr(torch, dtype)
    got, want = gradients(
        arrays, options, dt, start, operator=operator, tokens=tokens, trained=True
    )
    sweeps = [x for kernel in made for x in kernel.ran if x.get("READ", True)]
    count = {"hla2": 2, "ahla": 3, "hla3": 4}[operator]
    assert [(x["DOTS"], x["EVERY"]) for x in sweeps] == [(True, int(T > 64))] * count
    for name in ("dq", "dk", "dv") if exact else ():
        close(getattr(got, name), getattr(want, name), most=1e-6 if tokens else EXACT)
    for x, y in zip(got.dinitial_state or (), want.dinitial_state or (), strict=True):
        close(x, y, most=1e-6)
    rounded = {n: torch.tensor(x).to(dt).double().numpy() for n, x in arrays.items()}
    do, inputs = (rounded.pop("do"),), rounded | options
    scale = {"scale": inputs.pop("scale"), "operator": operator}
    if states:
        inputs["initial_state"] = start
    name = "dlog_gate" if gate == "log_gate" else "ddecay"
    gates_within_budget(
        getattr(got, name).double().numpy(), getattr(want, name),
        "float32" if exact else dtype, inputs, scale, do, operator=operator,
    )  # fmt: skip


def test_gradient_of_a_gate_of_heads_that_share_a_first_state(kernels, monkeypatch):
    """Each query head's products of S, which it shares, by its own gradient of S."""
    monkeypatch.setattr(hopper_backward, "PERIOD", 64)
    rng, T, D = np.random.default_rng(6), 130, 72
    kernels(exact=True)
    options = {"scale": 0.5, "log_gate": -rng.uniform(0, 0.02, size=(2, 1, T))}
    sizes = (2, 1, D, D), (2, 2, D, 40), (2, 1, D)
    start = HLA2State(*(rng.standard_normal(x) for x in sizes))
    arrays = given(rng, T, D, 40, (2, 2), keys=(2, 1))
    got, want = gradients(arrays, options, torch.float64, start, trained=True)
    for name in ("dq", "dk", "dv", "dlog_gate"):
        close(getattr(got, name), getattr(want, name), most=1e-6)
    for x, y in zip(got.dinitial_state, want.dinitial_state, strict=True):
        close(x, y, most=1e-6)


@pytest.mark.parametrize("gate", [None, "decay"])
def test_gradients_of_last_states(kernels, gate):
    """The reverse sweep begins from them; dS need not be symmetric."""
    rng, T, D, V = np.random.default_rng(3), 80, 128, 64
    kernel, *_ = kernels(exact=True)
    x = given(rng, T, D, V) | {"dS": rng.standard_normal((H, D, D))}
    x |= {"dF": rng.standard_normal((H, D, V)), "gate": np.full(H, 0.9)}
    decay = {"decay": 0.9} if gate else {}
    x["y"] = hla.scan(x["q"], x["k"], x["k"], operator="linear", **decay)
    x |= {n: np.full_like(x[m], np.nan) for n, m in (("dy", "k"), ("dk", "k"), ("dv", "v"))}
    x["dF0"] = np.full_like(x["dF"], np.nan)
    names = ("q", "k", "v", "do", "y", "dy", "dv", "dk", "dS", "dF", "dF0", "gate")
    arrays = [torch.tensor(x[n]) for n in names]
    call = Call(
        types.SimpleNamespace(tokens=T, gate=gate),
        {n: i for i, n in enumerate(names)},
        {n: Layout(tuple(a.shape), a.stride()) for n, a in zip(names, arrays, strict=True)},
        {n: a.dtype for n, a in zip(names, arrays, strict=True)},
        CUDA,
    )
    states = {"dS": "Z", "dF": "R", "dF0": "end"}  # as the kernel's operands are named
    refs = {states.get(n, n): Ref(n) for n in names[:-1]}
    refs |= {"left": None, "gate": Ref("gate") if gate else None}
    refs |= dict.fromkeys(("dots1", "dots2", "kept1", "kept2"))
    flags = False, True, 1.0, 1.0, False, False, None, None, None
    whole = Launch((), (), (), (), (), (), 1, *flags, (H,), (H,))
    for do in hopper_backward.launched(
        call, kernel, (H,), refs, "qkvgyabc", (1.0, 1.0), (1, 2), whole,
        {"Z": True, "SUM": False, "ADD": False, "READ": True, "START1": True, "START2": True,
         "END1": False, "END2": True, "DOTS": False, "EVERY": 0},
    ):  # fmt: skip
        do(arrays, [a.data_ptr() for a in arrays], None)
    got = dict(zip(names, arrays, strict=True))
    state = HLA2State(*(np.zeros((H, *s)) for s in ((D, D), (D, V), (D,))))
    _, pull = hla.vjp(
        x["q"], x["k"], x["v"], operator="hla2", return_state=True, initial_state=state, **decay
    )
    want = pull(x["do"], HLA2State(x["dS"], x["dF"], np.zeros((H, D))))
    close(got["dk"], want.dk)
    close(got["dv"], want.dv)
    close(got["dF0"], want.dinitial_state.F)


def test_what_is_not_served():
    """Other programs and wide heads take the passes; the gradient of a gate does where one does."""

    def served(D=64, heads=1, **options):
        q, k, v = (torch.zeros(2, n, 8, D, dtype=torch.bfloat16) for n in (1, 1, heads))
        options = {"operator": "hla2", "decay": None, "log_gate": None, "scale": 1.0} | options
        request, _, _ = prepare(q, k, v, gradient=True, **options)
        return [row.name for row in hopper_backward.rows(request)]

    assert len(served()) == len(served(decay=0.5)) == len(served(scale=0.3)) == 2
    assert len(served(operator="ahla")) == 2
    assert len(served(operator="hla3")) == 4
    assert len(served(operator="hla3", heads=2)) == 2  # y has fewer heads than u
    gate = {"log_gate": torch.zeros(2, 1, 8)}
    assert len(served(**gate)) == 2
    assert len(served(operator="ahla", **gate)) == 3
    assert len(served(operator="hla3", **gate)) == 4
    for options in (
        gate | {"D": 130}, {"D": 130}, {"normalize": True},
        {"ridge": 0.1},
        {"operator": "linear"}, {"mask": "prefix"}, {"scale": 0.0},
    ):  # fmt: skip
        assert not served(**options), options
    assert served(decay=0.5, convention="exact")
    assert not served(decay=0.5, convention="paper")


def test_the_kernel_of_a_gate_by_tokens_is_compiled_with_the_others(monkeypatch):
    """Of (B, T, H), which is copied when it runs: by its dtype, as what is yet to be."""
    found = []

    class Function:
        def warmup(self, *operands, grid, **constants):
            found.append(operands)

    monkeypatch.setattr(run, "gate_kernel", Function())
    q, k, v = (torch.zeros(2, 80, 3, 16, dtype=torch.bfloat16) for _ in "qkv")
    options = {"operator": "hla2", "decay": None, "log_gate": torch.zeros(2, 80, 3), "scale": 1.0}
    request, inputs, _ = prepare(q, k, v, gradient=True, axis=-3, **options)
    device = run.RUNNER.device._replace(rows=rows, limits=lambda *call: launch.WIDE)
    kind = Kind(True, False, torch.bfloat16)
    given = [*scan.given(request, inputs), *[torch.zeros(2, 3, 80, 16, dtype=q.dtype)] * 2]
    named = dict(zip(kind.names(request), given, strict=True))
    ready = Ready(device, kind.plan(device, request, q.device), request, named)
    kernels = run._kernels(ready, [16] * (len(given) + ready.more + 1))
    dtypes = {ready.call.slots[name]: dtype for name, dtype in ready.dtypes.items()}
    for kernel in kernels:
        if isinstance(kernel.function, Function):
            kernel.compile(given, dtypes)
    assert len(kernels) == 4
    assert [x[2] for x in found] == [torch.float32] * 2


@pytest.mark.parametrize("T", [1024, 2100])
@pytest.mark.parametrize(("operator", "sweeps"), [("hla2", 2), ("ahla", 3), ("hla3", 4)])
def test_a_gates_gradient_from_a_first_state(operator, sweeps, T):
    """Its S need not be symmetric: what it adds at later periods is a step, for which dS runs."""
    q, k, v = (torch.zeros(2, T, 16, dtype=torch.bfloat16) for _ in "qkv")
    options = {"operator": operator, "decay": None, "log_gate": torch.zeros(2, T), "scale": 1.0}
    request, _, _ = prepare(q, k, v, gradient=True, **options)
    for start in (False, True):
        made = hopper_backward.rows(request)
        steps = plan.backward(request, launch.narrow(9), made, start=start).steps
        count = collections.Counter(map(type, steps))
        added = int(start and T > 1024 and operator != "ahla")
        assert (count[Fused], count[Skew], count[Carry], count[Launch]) == (sweeps, *[added] * 3)
        assert {step.chunk for step in steps if isinstance(step, GateGradient)} == {64}


@pytest.mark.parametrize(("operator", "V", "taken"), [
    ("hla2", 64, "d.y"), ("ahla", 64, "d.u"), ("hla3", 64, "d.u"), ("hla3", 32, "d.y"),
    ("ahla", 32, ""),
])  # fmt: skip
def test_dq_takes_the_memory_of_what_it_reads(operator, V, taken):
    q, k, v = (torch.zeros(2, 8, n, dtype=torch.bfloat16) for n in (64, 64, V))
    plain = {"operator": operator, "decay": None, "log_gate": None, "scale": 1.0}
    request, _, _ = prepare(q, k, v, gradient=True, **plain)
    made = plan.backward(request, launch.WIDE, hopper_backward.rows(request))
    assert {n: x.reuses for n, x in made.buffers.items() if x.reuses} == (
        {"d.q": taken} if taken else {}
    )


# Ahead of time
STATES = {"START1": True, "START2": True, "END2": True}
DOTS = {"DOTS": True, "EVERY": 4}
SEGMENT = {"START1": True, "START2": True, "tokens": 1024}
KERNELS = [  # kernel, what it does, gate, what differs
    *(("reverse", {"Z": True}, gate, more) for gate in (0, 1, 2) for more in ({}, STATES)),
    *(("reverse", {"Z": True, "SUM": True}, gate, more) for gate, more in (
        (0, {}), (1, {}), (2, {}), (2, STATES), (2, SEGMENT), (2, {"B": 64}),
    )),
    ("reverse", {"Z": False}, 2, {"POWER2": 3}), ("queries", {}, 2, {"POWER2": 1}),  # of hla3
    *(("queries", {"ONE": True, "ADD": True}, gate, {"POWER1": power, "POWER2": power} | more)
      for gate, power, more in ((0, 0, {}), (2, 3, {}), (2, 3, DOTS))),
    *(("ahla", {}, gate, more) for gate, more in (
        (0, {}), (1, {}), (2, {}), (0, STATES), (2, SEGMENT), (2, {"B": 64}),
    )),
    ("ahla", {"READ": False, "END2": True}, 2, {"START1": True, "tokens": 1024}),
    *(("reverse", {"Z": False, "ADD": add}, gate, {}) for add in (False, True) for gate in (0, 2)),
    *(("queries", {"AHLA": ahla}, gate, {}) for ahla in (False, True) for gate in (0, 1, 2)),
    ("queries", {"AHLA": False}, 2, STATES),
    *((name, {}, 2, {"B": 64}) for name in ("reverse", "queries")),
    *((name, {}, 0, {"WHOLE_D": False, "WHOLE_V": False}) for name in ("reverse", "queries")),
    *((name, {}, 0, {"FAST": False, "WHOLE_D": False}) for name in ("reverse", "queries")),
    *((name, {"AHLA": False}, gate, DOTS) for name in ("reverse", "queries") for gate in (1, 2)),
    ("queries", {"AHLA": True}, 2, DOTS),
    ("reverse", {"SUM": True}, 2, DOTS), ("reverse", {"SUM": True}, 2, SEGMENT | DOTS),
    ("queries", {}, 2, {"FAST": False, "WHOLE_D": False} | DOTS),
    *((name, {}, 2, SEGMENT | DOTS) for name in ("reverse", "queries")),
    *((name, {}, gate, SEGMENT) for name in ("reverse", "queries") for gate in (0, 2)),
    *(("reverse", {"READ": False, "END1": True}, gate, {"START2": True, "tokens": 1024})
      for gate in (0, 1, 2)),
]  # fmt: skip
SPILLS = 64, 416  # bytes a thread, mostly in the mover; from the assembler of CUDA 13 on
DOTTED = 208, 512  # also in owners
BEGIN = 448  # before the first chunk, of states that are loaded
ODD = 1024, 1184  # without and with dots, in the mover, where rows are of no whole 16 bytes


def prepared(name, does, gate, more):
    """Return what `ahead` compiles for one case."""
    module = importlib.import_module(f"hla.kernels.triton.hopper_{name}")
    kernel = getattr(module, f"{name}_kernel")
    ones = name == "ahla" or does.get("AHLA") or does.get("SUM") or not does.get("Z", True)
    powers = (1, 1 if ones else 2) if gate else (0, 0)
    given = {
        "Z": True, "SUM": False, "ADD": False, "READ": True, "AHLA": False, "ONE": False,
        "GATE": gate, "SCALED": "START1" in more, "POWER1": powers[0], "POWER2": powers[1],
        "START1": False, "START2": False, "END1": False, "END2": False, "DOTS": False, "EVERY": 0,
        "B": 128, "WHOLE_D": True, "WHOLE_V": True, "FAST": True,
    } | does | more  # fmt: skip
    given |= {f"s{x}{e}": 2048 if e == "t" else 1 for x in "qkvguyabc" for e in "td"}
    asked = {"p_start1": "START1", "p_start2": "START2", "p_end2": "END2", "p_gate": "GATE"}
    given["DK"] = given["Z"] and not given["SUM"]
    asked |= {f"p_{n}{i}": "DOTS" for n in ("dots", "kept", "met") for i in (1, 2)}
    asked |= {"p_end1": "END1"} | ({"p_q": "DOTS"} if name == "queries" else {})
    asked |= {"p_k": "Z", "p_dk": "DK"} if name == "reverse" else {}
    if not given["READ"]:
        unread = ("p_k", "p_y", "p_dy") if name == "reverse" else ("p_v", "p_u", "p_du")
        asked |= dict.fromkeys((*unread, "p_dv", "p_dk"), "READ")
    cut = given.pop("tokens", 0)

    def absent(n):
        alone = n in ("p_dots1", "p_kept1") and not given["Z"]
        return n.startswith("p_") and (alone or not given.get(asked.get(n), True))

    signature, constants = {}, {n: x for n, x in given.items() if n in kernel.arg_names}
    for n in kernel.arg_names:
        wide = n.startswith(("p_start", "p_end", "p_gate", "p_dots", "p_met"))
        if n in constants:
            signature[n] = "constexpr"
        elif (not cut and n in ("tokens", "szn", "ssn", "sen", "swn")) or absent(n):
            signature[n], constants[n] = "constexpr", None
        elif n.startswith("p_"):
            signature[n] = "*fp32" if wide else "*bf16"
        else:
            signature[n] = "fp32" if n in ("scale", "unscale") else "i32"
    return {
        "kernel": f"{module.__name__}.{name}_kernel", "gluon": True, "signature": signature,
        "constants": constants, "arch": 90, "options": {"num_warps": 4},
        "aligned": [n for n, x in signature.items() if x == "*bf16" and given["FAST"]],
    }  # fmt: skip


@pytest.mark.aot
@pytest.mark.parametrize("case", KERNELS, ids=named)
def test_compiled_for_the_hardware(compiled, case):
    found, more = compiled(prepared(*case)), case[3]
    assert found["shared"] <= 227 * 1024
    assert found["wgmma"] > 0
    assert found["mma"] == 0
    dots, late = more.get("DOTS", False), found["assembler"] >= 13
    most = (DOTTED if dots else SPILLS)[late]
    if "START1" in more:
        most = max(most, BEGIN)
    assert found["spills"] <= (most if more.get("FAST", True) else ODD[dots])
    safe(found)
