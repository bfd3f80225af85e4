"""Bad calls raise the right exception, name their argument and touch nothing."""

import contextlib
import functools
import itertools
import pathlib
import re

import numpy as np
import pytest
from conftest import close, draw, installed, load, numpy_dtype

import hla
from hla import arguments

H, T, D, V = 2, 7, 5, 3
PACKAGE = pathlib.Path(hla.__file__).parent.as_posix()


def arrays(dtype="float64"):
    return dict(zip("qkv", (x.astype(numpy_dtype(dtype)) for x in draw(H, T)), strict=True))


def token():
    return dict(zip(("q_t", "k_t", "v_t"), (x[:, 0] for x in draw(H, T)), strict=True))


@functools.cache
def state(operator="hla2", mask="causal", ridge=0.0, heads=H, width=D):
    options = {"operator": operator, "mask": mask, "ridge": ridge}
    return hla.scan(*draw(heads, 4, D=width), return_state=True, **options)[1]


@functools.cache
def segment(operator="hla2", mask="causal", width=D, heads=H):
    return hla.summarize(*draw(heads, 4, D=width), operator=operator, mask=mask)


def cast(dtype, names="qkv"):
    whole = arrays()
    return {n: whole[n].astype(numpy_dtype(dtype)) for n in names}


nan, inf = float("nan"), float("inf")
BOTH = (TypeError, ValueError)

# id: (arguments that replace those of a good hla.scan call, exception, pattern of its message)
SCAN = {
    "q list": ({"q": [[1.0, 2.0]]}, TypeError, r"\bq\b"),
    "q None": ({"q": None}, TypeError, r"\bq\b"),
    "k number": ({"k": 1.0}, TypeError, r"\bk\b"),
    "v list": ({"v": [[1.0]]}, TypeError, r"\bv\b"),
    "q one axis": ({"q": np.zeros(D)}, ValueError, r"\bq\b"),
    "v one axis": ({"v": np.zeros(V)}, ValueError, r"\bv\b"),
    "k width": ({"k": np.zeros((H, T, 6))}, ValueError, r"\bk\b.*\(2, 7, 6\).*\(2, 7, 5\)"),
    "k tokens": ({"k": np.zeros((H, 8, D))}, ValueError, r"\bk\b.*\(2, 8, 5\).*\(2, 7, 5\).*axis"),
    "v tokens": ({"v": np.zeros((H, 8, V))}, ValueError, r"\bv\b.*\(2, 8, 3\).*axis"),
    "one k token": ({"k": np.zeros((H, 1, D))}, ValueError, r"\bk\b"),
    "k heads": ({"k": np.zeros((3, T, D))}, ValueError, r"\bk\b.*\(3, 7, 5\)"),
    "fewer key heads": (
        {"q": np.zeros((1, 8, T, D)), "k": np.zeros((1, 2, T, D)), "v": np.zeros((1, 2, T, V))},
        ValueError,
        r"\bk\b.*q as \(1, 2, 4, 7, 5\), k as \(1, 2, 1, 7, 5\) \(v alike\)$",
    ),
    "fewer key heads behind the tokens": (
        {"q": np.zeros((T, 8, D)), "k": np.zeros((T, 2, D)), "v": np.zeros((T, 2, V)), "axis": -3},
        ValueError,
        r"\bk\b.*q as \(7, 2, 4, 5\), k as \(7, 2, 1, 5\) \(v alike\), and axis=-4$",
    ),
    "fewer value heads": (
        {"q": np.zeros((6, T, D)), "k": np.zeros((6, T, D))}, ValueError,
        r"\bv\b.*\(6,\) of q and k.*q as \(2, 3, 7, 5\), v as \(2, 1, 7, 3\)$",
    ),
    **{
        f"{name} byte order": ({name: x.astype(x.dtype.newbyteorder())}, TypeError,
                               rf"^{name} has dtype .f8.*native byte order.*newbyteorder\(\"=\"\)")
        for name, x in (arrays() | {"decay": np.ones(H), "log_gate": np.zeros(T)}).items()
    },
    "state byte order": (
        {"initial_state": state()._replace(F=state().F.astype(state().F.dtype.newbyteorder()))},
        BOTH, r"^initial_state\.F.*native byte order",
    ),
    "v heads": ({"v": np.zeros((3, T, V))}, ValueError, r"\bv\b.*\(3, 7, 3\)"),
    "q int": (cast("int64", "q"), TypeError, r"\bq\b.*int64"),
    "all int": (cast("int32"), TypeError, r"\bq\b.*int32"),
    "all complex": (cast("complex128"), TypeError, r"\bq\b.*complex128"),
    "all bool": (cast("bool"), TypeError, r"\bq\b.*bool"),
    "all object": (cast("object"), TypeError, r"\bq\b.*object"),
    "k dtype": (cast("float32", "k"), TypeError, r"\bk\b.*float32"),
    "v dtype": (cast("float32", "v"), TypeError, r"\bv\b.*float32"),
    "operator": ({"operator": "hla4"}, ValueError, r"operator.*hla4.*hla3"),
    "operator type": ({"operator": 2}, BOTH, r"operator"),
    "mask": ({"mask": "full"}, ValueError, r"mask.*full.*prefix"),
    "form": ({"form": "fast"}, ValueError, r"form.*fast.*recurrent"),
    "convention": ({"convention": "letter"}, ValueError, r"convention.*letter.*paper"),
    "backend": ({"backend": "tpu"}, ValueError, r"backend.*tpu"),
    "backend in a list": ({"backend": ["numpy", "tpu"]}, ValueError, r"backend.*tpu"),
    "no backend in a list": ({"backend": []}, ValueError, r"backend"),
    "backend type": ({"backend": 3}, BOTH, r"backend"),
    **{
        f"decay {x}": ({"decay": x}, ValueError, rf"decay.*{x}")
        for x in (0.0, -0.1, 2.0, nan, inf, -inf)
    },
    "decay array of 0": ({"decay": np.array([0.5, 0.0])}, ValueError, r"decay.*\(0, 1\]"),
    "decay array above 1": ({"decay": np.array([0.5, 1.5])}, ValueError, r"decay.*\(0, 1\]"),
    "decay array of nan": ({"decay": np.array([0.5, nan])}, ValueError, r"decay.*\(0, 1\]"),
    "decay per token": ({"decay": np.full(T, 0.5)}, ValueError, r"decay.*\(7,\).*\(2,\)"),
    "decay of more heads": ({"decay": np.full((3, H), 0.5)}, ValueError, r"decay.*\(3, 2\)"),
    "decay text": ({"decay": "0.9"}, TypeError, r"decay"),
    "decay complex": ({"decay": 0.5j}, TypeError, r"decay"),
    "decay integers": ({"decay": np.ones(H, int)}, BOTH, r"decay.*int"),
    "decay float16": ({"decay": np.full(H, 0.5, np.float16)}, BOTH, r"decay.*float16.*float32"),
    "decay float16 number": ({"decay": np.float16(0.5)}, BOTH, r"decay.*float16.*float32"),
    "decay bfloat16": (
        {"decay": np.full(H, 0.5, numpy_dtype("bfloat16"))}, BOTH, r"decay.*bfloat16.*float32"
    ),
    "gate positive": ({"log_gate": np.full((H, T), 0.1)}, ValueError, r"log_gate"),
    "gate nan": ({"log_gate": np.full((H, T), nan)}, ValueError, r"log_gate"),
    "gate inf": ({"log_gate": np.full((H, T), inf)}, ValueError, r"log_gate"),
    "gate tokens": ({"log_gate": np.zeros((H, 8))}, ValueError, r"log_gate.*\(2, 8\).*\(2, 7\)"),
    "gate heads": ({"log_gate": np.zeros((3, T))}, ValueError, r"log_gate.*\(3, 7\)"),
    "gate per feature": ({"log_gate": np.zeros((H, T, D))}, ValueError, r"log_gate.*\(2, 7, 5\)"),
    "gate integers": ({"log_gate": np.zeros((H, T), int)}, BOTH, r"log_gate.*int"),
    "gate text": ({"log_gate": "-1"}, TypeError, r"log_gate"),
    "decay and gate": (
        {"decay": 0.5, "log_gate": np.zeros((H, T))}, ValueError, r"decay.*log_gate|log_gate.*decay"
    ),
    **{
        f"{name} {x}": ({name: x}, error, name)
        for name, values in {"scale": (nan, inf), "eps": (-1.0, nan), "ridge": (-0.5, nan)}.items()
        for x, error in (*((x, ValueError) for x in values), ("1", TypeError), (1j, TypeError))
    },
    "what scale to take": ({"scale": nan}, ValueError, r"q\.shape\[-1\] \*\* -0\.5"),
    "scale beyond floats": ({"scale": 10**400}, ValueError, r"scale.*finite"),
    "what eps to take": ({"eps": -1.0}, ValueError, r">= 0.*1e-6"),
    "what ridge to take": ({"ridge": -1.0}, ValueError, r">= 0.*0\.0 is none"),
    "axis None": ({"axis": None}, TypeError, r"axis is None"),
    "axis True": ({"axis": True}, TypeError, r"axis is True"),
    "decay list": ({"decay": [0.5, 0.5]}, TypeError, r"decay is a list.*number in \(0, 1\]"),
    "scale True": ({"scale": True}, TypeError, r"scale.*True"),
    "normalize 0": ({"normalize": 0}, TypeError, r"normalize.*0"),
    "return_state 0": ({"return_state": 0}, TypeError, r"return_state.*0"),
    "ridge False": ({"ridge": False}, TypeError, r"ridge.*False"),
    "chunk_size True": ({"chunk_size": True}, ValueError, r"chunk_size.*True"),
    "scale array": ({"scale": np.ones(H)}, TypeError, r"scale"),
    "ridge of ahla": ({"ridge": 0.5, "operator": "ahla"}, ValueError, r"ridge.*ahla.*hla2"),
    "ridge of hla3": ({"ridge": 0.5, "operator": "hla3"}, ValueError, r"ridge.*hla3.*hla2"),
    "none with decay": ({"mask": "none", "decay": 0.5}, ValueError, r"decay.*none"),
    "none with gate": ({"mask": "none", "log_gate": np.zeros(T)}, ValueError, r"log_gate.*none"),
    "none with state": ({"mask": "none", "initial_state": state()}, ValueError, r"state.*none"),
    "none and state": ({"mask": "none", "return_state": True}, ValueError, r"return_state.*none"),
    "axis of features": ({"axis": -1}, ValueError, r"axis.*-1"),
    "axis past the end": ({"axis": 5}, ValueError, r"axis.*5"),
    "axis before the start": ({"axis": -4}, ValueError, r"axis.*-4"),
    "axis float": ({"axis": 0.5}, TypeError, r"axis"),
    **{f"chunk_size {x}": ({"chunk_size": x}, ValueError, rf"chunk_size.*{x}") for x in (0, -3)},
    "chunk_size float": ({"chunk_size": 2.5}, TypeError, r"chunk_size"),
    "state of ahla": ({"initial_state": state("ahla")}, ValueError, r"initial_state"),
    "state of prefix": ({"initial_state": state(mask="prefix")}, ValueError, r"initial_state"),
    "state without ridge": ({"initial_state": state(), "ridge": 0.5}, ValueError, r"ridge"),
    "state width": ({"initial_state": state(width=6)}, ValueError, r"initial_state.*\bS\b.*6"),
    "state heads": ({"initial_state": state(heads=3)}, ValueError, r"initial_state.*\(3, 5, 5\)"),
    "state dict": ({"initial_state": state()._asdict()}, TypeError, r"initial_state.*dict"),
    "state tuple": ({"initial_state": tuple(state())}, BOTH, r"initial_state"),
    "state of the exact convention": (
        {"initial_state": state(), "convention": "paper", "decay": 0.9}, ValueError, "initial_state"
    ),
    "state integers": (
        {"initial_state": state()._replace(eta=np.zeros((H, D), int))}, TypeError, r"initial_state"
    ),
    "a segment as state": ({"initial_state": segment()}, BOTH, r"initial_state"),
    "unknown keyword": ({"decays": 0.5}, TypeError, r"decays"),
}  # fmt: skip


def bad(table):
    return [pytest.param(*row, id=name) for name, row in table.items()]


@pytest.mark.parametrize("call", [hla.scan, hla.vjp], ids=["scan", "vjp"])
@pytest.mark.parametrize(("change", "error", "message"), bad(SCAN))
def test_bad_calls_name_the_argument_and_modify_nothing(call, change, error, message):
    given = arrays() | change
    kept = {n: x.copy() for n, x in given.items() if isinstance(x, np.ndarray)}
    for mask in ("causal", "none"):  # the good call alike, whose checks are remembered
        call(**arrays() | {"mask": mask})
    with pytest.raises(error, match=f"(?s){message}") as caught:
        call(**given)
    assert not isinstance(caught.value, hla.Unsupported)
    if "decays" not in change:
        assert PACKAGE in caught.traceback[-1].path.as_posix()  # no library's own error
    for name, x in kept.items():
        np.testing.assert_array_equal(given[name], x)


STEP = {
    "few key heads": (
        {"q_t": np.zeros((8, D)), "k_t": np.zeros((2, D))},
        ValueError,
        r"k_t.*q_t as \(2, 4, 5\), k_t as \(2, 1, 5\) \(v_t alike\)$",
    ),
    "k library": ({"k_t": [1.0]}, TypeError, r"^k_t is a list"),
    "a state's field": (
        {"state": state()._replace(S=np.ones((3, D, D)))},
        ValueError,
        r"^state\.S .*\(3, 5, 5\)",
    ),
    "a state's dtype": (
        {"state": state()._replace(S=np.ones((H, D, D), int))},
        TypeError,
        r"^state\.S .*int64",
    ),
    "a packed state": (
        {"state": state().pack()._replace(S=np.ones((H, 14)))},
        ValueError,
        r"^state\.S .*\(2, 14\).*\(2, 15\)",
    ),
    "donate": ({"donate": 1}, TypeError, r"^donate is 1"),
    "q width": ({"q_t": np.zeros((H, 6))}, ValueError, r"[qk]_t.*\(2, 6\)|\(2, 6\).*[qk]_t"),
    "k heads": ({"k_t": np.zeros((3, D))}, ValueError, r"k_t"),
    "v scalar": ({"v_t": np.zeros(())}, ValueError, r"v_t"),
    "k dtype": ({"k_t": np.zeros((H, D), np.float32)}, TypeError, r"k_t.*float32"),
    "state of ahla": ({"state": state("ahla")}, ValueError, r"state"),
    "state width": ({"state": state(width=6)}, ValueError, r"state.*6"),
    "state list": ({"state": [1.0]}, BOTH, r"state"),
    "gate positive": ({"log_gate": 0.5}, ValueError, r"log_gate"),
    "gate shape": ({"log_gate": np.zeros((H, T))}, ValueError, r"log_gate.*\(2, 7\)"),
    "decay": ({"decay": 0.0}, ValueError, r"decay"),
    "mask none": ({"mask": "none"}, ValueError, r"^mask is 'none', which has no steps"),
    "mask none with a state": (
        {"mask": "none", "state": state()},
        ValueError,
        r"^mask is 'none', which has no steps",
    ),
    "ridge": ({"ridge": 1.0, "state": state()}, ValueError, r"^state .*ridge"),
}


@pytest.mark.parametrize(("change", "error", "message"), bad(STEP))
def test_bad_steps(change, error, message):
    with pytest.raises(error, match=f"(?s){message}") as caught:
        hla.step(**token() | change)
    assert not re.search(
        r"initial_state|return_state|axis=|token axis|\b[qkv]\b", str(caught.value)
    )


@functools.cache
def pulled(packed=False, **options):
    start = state().pack() if packed else None
    return hla.vjp(**arrays(), initial_state=start, **options)[1]


def pull(change, *, packed=False):
    """A pullback with the state's gradient but for one field."""
    good = state().pack() if packed else state()
    return pulled(packed, return_state=True)(None, good._replace(**change))


def join(side, change, kind=segment):
    pair = {"left": kind(), "right": segment()}
    pair[side] = pair[side]._replace(**change)
    return hla.combine(**pair)


ALGEBRA = {
    "summarize none": (lambda: hla.summarize(**arrays(), mask="none"), ValueError, "mask.*none"),
    "summarize k": (
        lambda: hla.summarize(**arrays() | {"k": np.zeros((H, T, 6))}), ValueError, r"\bk\b"
    ),
    "two states": (lambda: hla.combine(state(), state()), TypeError, "right"),
    "state on the right": (lambda: hla.combine(segment(), state()), TypeError, "right"),
    "arrays": (lambda: hla.combine(np.ones(3), segment()), TypeError, "left"),
    "operators": (lambda: hla.combine(segment(), segment("ahla")), BOTH, "right"),
    "masks": (lambda: hla.combine(segment(), segment(mask="prefix")), BOTH, "right"),
    "state and segment": (lambda: hla.combine(state("ahla"), segment()), BOTH, "right"),
    "widths": (lambda: hla.combine(segment(), segment(width=6)), ValueError, "right"),
    "do shape": (
        lambda: hla.vjp(**arrays())[1](np.zeros((H, T, 4))), ValueError, r"\bdo\b.*\(2, 7, 4\)"
    ),
    "do library": (lambda: hla.vjp(**arrays())[1]([1.0]), TypeError, r"\bdo\b"),
    "do dtype": (lambda: hla.vjp(**arrays())[1](np.ones((H, T, V), int)), TypeError, r"\bdo\b"),
    "dstate": (
        lambda: hla.vjp(**arrays(), return_state=True)[1](np.zeros((H, T, V)), state("ahla")),
        BOTH,
        "dstate",
    ),
    "do byte order": (lambda: pulled()(np.ones((H, T, V), ">f8")), TypeError, "^do .*native byte"),
    "do broadcasts": (lambda: pulled()(np.ones((1, T, V))), ValueError, r"^do .*\(2, 7, 3\)"),
    "dstate not asked": (lambda: pulled()(None, state()), ValueError, "^dstate.*return_state=True"),
    "dstate list": (lambda: pulled(return_state=True)(None, [1.0]), TypeError, "^dstate is a list"),
    "dstate whole for packed": (
        lambda: pulled(True, return_state=True)(None, state()), ValueError, "^dstate.*PackedState"
    ),
    "dstate shape": (
        lambda: pull({"S": np.ones((H, D, 4))}), ValueError, r"^dstate\.S .*5, 4\).*\(2, 5, 5\)"
    ),
    "dstate broadcasts": (
        lambda: pull({"F": np.ones((D, V))}), ValueError, r"^dstate\.F .*\(5, 3\).*\(2, 5, 3\)"
    ),
    "dstate of a packed state": (
        lambda: pull({"S": np.ones((H, D, D))}, packed=True), ValueError, r"^dstate\.S .*\(2, 15\)"
    ),
    "dstate integers": (
        lambda: pull({"S": np.ones((H, D, D), int)}), TypeError, r"^dstate\.S .*int64"
    ),
    "dstate complex": (
        lambda: pull({"eta": np.ones((H, D), complex)}), TypeError, r"^dstate\.eta .*complex128"
    ),
    "dstate field": (lambda: pull({"eta": [1.0]}), TypeError, r"^dstate\.eta is a list"),
    **{
        f"{side} {name}": (functools.partial(join, side, change), error, message)
        for side in ("left", "right")
        for name, change, error, message in (
            ("list", {"C": [1.0]}, TypeError, rf"^{side}\.C is a list"),
            ("None", {"C": None}, TypeError, rf"^{side}\.C is None"),
            ("integers", {"C": np.ones((H, D, V), int)}, TypeError, rf"^{side}\.C .*int64"),
            ("dtype", {"C": np.ones((H, D, V), "f4")}, TypeError, rf"^{side}\.C .*float32"),
            ("sizes", {"G": np.ones((H, D, 4))}, ValueError, rf"^{side}\.G .*\(2, 5, 4\).*5, 3\)"),
            ("axes", {"G": np.ones(V)}, ValueError, rf"^{side}\.G .*\(3,\)"),
            ("heads", {"G": np.ones((3, D, V))}, ValueError, rf"^{side}\.\w+ .*batch axes"),
            ("rho", {"rho": np.ones(3)}, ValueError, rf"^{side}\.rho .*batch axes"),
        )
    },
    "heads": (lambda: hla.combine(segment(heads=3), segment()), ValueError, r"^right.*\(3,\)"),
    "a state's widths": (
        lambda: join("left", {"F": np.ones((H, D, 4))}, state), ValueError, r"^left\.F .*5, 4\)"
    ),
    "a packed state's S": (
        lambda: join("left", {"S": np.ones((H, 21))}, lambda: state().pack()), ValueError,
        r"^left\.S .*\(2, 21\).*15\)",
    ),
    "packed without a triangle": (
        lambda: state().pack()._replace(S=np.ones((H, 14))).unpack(), ValueError, r"^S .*\(2, 14\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), bad(ALGEBRA))
def test_bad_algebra_and_pullbacks(call, error, message):
    with pytest.raises(error, match=f"(?s){message}") as caught:
        call()
    assert PACKAGE in caught.traceback[-1].path.as_posix()  # no library's own error


@pytest.mark.parametrize(
    ("one", "other"), [*itertools.permutations(["numpy", "torch", "jax", "array_api_strict"], 2)]
)
def test_libraries_do_not_mix(one, other):
    q, _, _ = load(one).arrays(*draw(H, T))
    _, k, v = load(other).arrays(*draw(H, T))
    with pytest.raises(TypeError, match=r"\bk\b"):
        hla.scan(q, k, v)
    q, k, _ = load(one).arrays(*draw(H, T))
    with pytest.raises(BOTH, match="initial_state"):
        hla.scan(q, k, load(one).array(draw(H, T)[2], "float64"),
                 initial_state=type(state())(*load(other).arrays(*state())))  # fmt: skip


@pytest.mark.parametrize("name", ["torch", "jax", "array_api_strict"])
@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_libraries_refuse_what_is_not_floating(name, dtype):
    q, k, v = load(name).arrays(*(abs(x) for x in draw(H, T)), dtype=dtype)
    with pytest.raises(TypeError, match=r"\bq\b"):
        hla.scan(q, k, v)


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_float8_is_refused(name):
    q, k, v = load(name).arrays(*draw(H, T), dtype="float8_e4m3fn")
    with pytest.raises(TypeError, match=r"\bq\b.*float8_e4m3fn"):
        hla.scan(q, k, v)


def _distributed(torch, x):
    """A DTensor of one process."""
    dist = installed("torch.distributed")
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch without gloo")
    tensor = installed("torch.distributed.tensor")
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = tensor.init_device_mesh("cpu", (1,))
    return tensor.distribute_tensor(x, mesh, [tensor.Replicate()])


IRREGULAR = {
    "sparse": (lambda torch, x: x.to_sparse(), "to_dense"),
    "csr": (lambda torch, x: x[0].to_sparse_csr(), "to_dense"),
    "mkldnn": (lambda torch, x: x.float().to_mkldnn(), "to_dense"),
    "nested": (lambda torch, x: torch.nested.nested_tensor([*x]), "to_padded_tensor"),
    "jagged": (
        lambda torch, x: torch.nested.nested_tensor([x[0], x[0, 1:]], layout=torch.jagged),
        "to_padded_tensor",
    ),
    "quantized": (
        lambda torch, x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8), "dequantize"
    ),
    "masked": (lambda torch, x: torch.masked.masked_tensor(x, x == x), "to_tensor"),
    "distributed": (_distributed, "full_tensor.*to_local"),
}  # fmt: skip


@pytest.fixture
def no_process_group():
    yield
    dist = installed("torch").distributed
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("no_process_group")
@pytest.mark.filterwarnings("ignore")  # of torch, that these kinds are prototypes
@pytest.mark.parametrize(("make", "remedy"), bad(IRREGULAR))
def test_tensors_that_are_not_plain_memory(make, remedy):
    """Refused in our words with the remedy, also where a plain tensor of the shape went before."""
    torch = installed("torch")
    q, k, v = load("torch").arrays(*draw(H, T))
    (_, last), pullback = hla.vjp(q, k, v, return_state=True)
    odd, short = make(torch, q), make(torch, q[:, 0][None])
    calls = {
        "q": lambda: hla.scan(odd, k, v),
        "k": lambda: hla.vjp(q, odd, v),
        "v": lambda: hla.summarize(q, k, odd),
        "q_t": lambda: hla.step(short, k[:, 0], v[:, 0]),
        "decay": lambda: hla.scan(q, k, v, decay=odd),
        "log_gate": lambda: hla.scan(q, k, v, log_gate=odd),
        "initial_state.F": lambda: hla.scan(q, k, v, initial_state=last._replace(F=odd)),
        "do": lambda: pullback(odd),
        "dstate.F": lambda: pullback(None, last._replace(F=odd)),
        "left.C": lambda: hla.combine(
            hla.summarize(q, k, v)._replace(C=odd), hla.summarize(q, k, v)
        ),
    }
    for name, call in calls.items():
        with pytest.raises(BOTH, match=f"(?s)^{name} (is|has) .*{remedy}"):
            call()


@pytest.mark.parametrize("name", ["numpy", "torch", "jax", "array_api_strict"])
def test_a_decay_that_its_one_rounding_makes_zero(name):
    """As refused as 0 itself; what is the least of float32 is not, nor anything for float64."""
    library = load(name)
    x = library.array(np.ones((2, 3, 1)), "float32")
    given = [1e-50, 2.0**-150, np.float64(1e-300), library.array([0.5, 1e-50], "float64")]
    for decay in given:
        with np.errstate(all="raise"), pytest.raises(ValueError, match=r"which is 0 in float32"):
            hla.scan(x, x, x, decay=decay)
    hla.scan(x, x, x, decay=2.0**-149)
    hla.scan(x, x, x, decay=library.array([0.5, 1e-40], "float32"))
    wide = library.array(np.ones((2, 3, 1)), "float64")
    o = hla.scan(wide, wide, wide, decay=1e-50, operator="linear")
    close(library.numpy(o), np.ones((2, 3, 1)))


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_checks_are_remembered_by_what_they_look_at(name, monkeypatch):
    """A call alike is only looked up, whatever its values; their range is checked all the same."""
    lib = load(name)

    def call(seed, decay, **options):
        q, k, v = lib.arrays(*draw(H, T, seed=seed))
        _, last = hla.scan(q, k, v, initial_state=start, return_state=True, decay=decay, **options)
        token = [x[:, 0] for x in (q, k, v)]
        return hla.step(*token, last, decay=decay, donate=True)

    _, start = hla.scan(*lib.arrays(*draw(H, T)), return_state=True)
    decays = lib.array(np.full(H, 0.9), "float64"), lib.array(np.full(H, 0.8), "float64")
    for decay in (0.9, decays[0], None):
        call(0, decay)
        gate = lib.array(-np.ones((H, T)), "float64")
        hla.vjp(*lib.arrays(*draw(H, T)), log_gate=gate)
    checked = []
    check = arguments._check
    monkeypatch.setattr(arguments, "_check", lambda *args: checked.append(args) or check(*args))
    for decay in (0.5, decays[1], None):
        call(1, decay)
        hla.vjp(*lib.arrays(*draw(H, T, seed=1)), log_gate=gate / 2)
    assert not checked
    for decay in (0.0, 2.0, -decays[1], 2 * decays[1]):
        with pytest.raises(ValueError, match="decay"):
            call(1, decay)
    assert not checked
    for number, options in enumerate(({"scale": 2}, {"eps": True}, {"chunk_size": 7}), 1):
        with contextlib.suppress(TypeError):
            call(1, 0.5, **options)
        assert len(checked) >= number
