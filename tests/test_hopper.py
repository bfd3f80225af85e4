"""The fused forward on Hopper, without one: interpreted against float64, compiled ahead of time.

Interpreted, every float is a float64 but what kernels store, so that what is wrong is no rounding;
partitions, copies and products are ordered at random (tests/gluon_interpreter.py). The searches
through compiled kernels are those of tests/test_kernels.py, and are marked `aot` as they are.
"""

import functools
import math
import re

import ml_dtypes
import numpy as np
import pytest
from conftest import installed
from test_kernels import named, safe

installed("triton")
gluon_interpreter = installed("gluon_interpreter")
hopper = installed("hla.kernels.triton.hopper")
hopper3 = installed("hla.kernels.triton.hopper3")

ROUNDED = 2e-3  # of one rounding to bfloat16, relative
STATES = 1e-6  # of states, which are float32
UNSUMMED = (None,) * 39  # strides of denominators (tests/device/test_owners.py has them)


def sums(ahla, q, k, v, log_g, powers, factors, S, F):
    """(made, o, states) of one head in float64, token by token; y or u is what is made."""
    made, o = [], []
    for q_t, k_t, v_t, a in zip(q, k, v, log_g, strict=True):
        S = math.exp(powers[0] * a) * S + np.outer(k_t, v_t if ahla else k_t)
        made.append(factors[0] * q_t @ S)
        keys, values = (k_t, made[-1]) if ahla else (made[-1], v_t)
        F = math.exp(powers[1] * a) * F + np.outer(keys, values)
        o.append(factors[1] * q_t @ F)
    return np.stack(made), np.stack(o), S, F


def triple(q, k, v, log_g, power, scales, S, P, F):
    """(y, u, o, states) of hla3 and one head in float64, token by token."""
    y, u, o = [], [], []
    for q_t, k_t, v_t, a in zip(q, k, v, log_g, strict=True):
        S = math.exp(a) * S + np.outer(k_t, k_t)
        P = math.exp(a) * P + np.outer(k_t, v_t)
        y.append(scales[0] * q_t @ S)
        u.append(scales[1] * q_t @ P)
        F = math.exp(power * a) * F + np.outer(y[-1], u[-1])
        o.append(scales[2] * q_t @ F)
    return np.stack(y), np.stack(u), np.stack(o), S, P, F


def strides(x, own, unit=1):
    """Three strides of heads, 0 where there is one for all, and those of a head's own axes."""
    if x is None:
        return (0,) * (3 + own)
    steps = [step // x.itemsize for step in x.strides]
    lead = [0 if n == 1 else step // unit for n, step in zip(x.shape[:3], steps, strict=False)]
    return (*lead, *(step // unit if own == 2 and i == 0 else step
                     for i, step in enumerate(steps[3:])))  # fmt: skip


class Case:
    """Arrays of one call, and the call."""

    def __init__(self, seed=0, *, T=100, D=128, V=128, heads=(1, 1, 1), shared=(), ahla=False,
                 gate=0, start=False, end=False, keep=False, read=True, factors=(1, 1),
                 fast=True, wide=False, strong=False):  # fmt: skip
        random = np.random.default_rng(seed)
        self.ahla, self.gate, self.factors, self.heads = ahla, gate, factors, heads
        Y = V if ahla else D

        def made(name, *shape):
            lead = (1, 1, 1) if name in shared else heads
            x = random.standard_normal((*lead, *shape)) / shape[-1] ** 0.25
            return x.astype(ml_dtypes.bfloat16 if name in "qkv" else np.float32)

        def blank(*shape, dtype=np.float32):
            return np.full((*heads, *shape), np.nan, dtype)

        self.q, self.k, self.v = made("q", T, D), made("k", T, D), made("v", T, V)
        narrow = ml_dtypes.bfloat16
        self.y = blank(T, Y, dtype=narrow) if keep else None
        self.o = blank(T, V, dtype=np.float32 if wide else narrow) if read else None
        if not fast:  # rows at odd places, and every other column
            rows = blank(T, 2 * D + 1, dtype=narrow)
            rows[..., 1::2], self.q = self.q, rows[..., 1::2]
            self.o = blank(T, V + 3, dtype=narrow)[..., 1 : V + 1]
        self.start = [made("s", D, Y), made("s", D, V)] if start else [None, None]
        turned = blank(V, D).swapaxes(-1, -2)
        self.end = [blank(D, Y), turned] if end else [None, None]
        self.g = None
        if gate == 1:
            low = 0.2 if strong else 0.9  # then a chunk's weights are no two factors
            self.g = random.uniform(low, low + 0.1, heads).astype(np.float32)
        elif gate == 2:
            self.g = -random.exponential(0.05, (*heads, T)).astype(np.float32)
            self.g[..., T // 3 : T : 40] = -np.inf
        powers = (1, 1) if ahla else (1, 2)
        unit, BD, BV = 8 if fast else 1, 64 * -(-D // 64), 64 * -(-V // 64)
        arrays = (self.q, self.k, self.v, self.y, self.o, self.start[0], self.end[0],
                  self.start[1], self.end[1])  # fmt: skip
        steps = [strides(x, 2, unit if i < 5 else 1) for i, x in enumerate(arrays)]
        gates = (0,) * 4 if gate == 0 else (*strides(self.g, gate - 1), 0)[:4]
        steps = [x if i < 5 else (*x[:3], None, *x[3:]) for i, x in enumerate(steps)]
        self.args = (*arrays, *[None] * 7, self.g, *factors, None, T, None, D, V, *heads[1:],
                     *(n for each in steps for n in each), *UNSUMMED, *gates)  # fmt: skip
        self.constants = {
            "AHLA": ahla, "READ": read, "WIDE": wide, "KEEP": keep, "GATE": gate,
            "POWER1": powers[0] * (gate > 0), "POWER2": powers[1] * (gate > 0),
            "SCALED1": factors[0] != 1, "SCALED2": factors[1] != 1,
            "START1": start, "END1": end, "START2": start, "END2": end,
            "SUMS": False, "DEN": False, "BD": BD, "BV": BV,
            "WHOLE_D": D == BD, "WHOLE_V": V == BV, "FAST": fast,
        }  # fmt: skip
        self.powers = powers
        self.run = lambda: gluon_interpreter.run(
            hopper.pair_kernel, (math.prod(heads),), *self.args, seed=seed, exact=True,
            spare=[(3, 1)] if strong else [], **self.constants,
        )  # fmt: skip

    def wanted(self, at):
        """Results of one head."""

        def of(x):
            head = tuple(0 if n == 1 else i for i, n in zip(at, x.shape, strict=False))
            return x[head].astype(np.float64)

        q, k, v = map(of, (self.q, self.k, self.v))
        a = np.zeros(len(q)) if self.gate == 0 else of(self.g)
        a = np.log(a) * np.ones(len(q)) if self.gate == 1 else np.maximum(a, -1e6)
        shapes = ((k.shape[1], (v if self.ahla else k).shape[1]), (k.shape[1], v.shape[1]))
        S, F = (np.zeros(n) if x is None else of(x)
                for x, n in zip(self.start, shapes, strict=True))  # fmt: skip
        return sums(self.ahla, q, k, v, a, self.powers, self.factors, S, F)


def off(x, want):
    """Error relative to what is wanted."""
    return np.linalg.norm(x.astype(np.float64) - want) / np.linalg.norm(want)


SCALED = 0.5, -3.0
CASES = {
    "one token": {"T": 1, "end": True},
    "63 tokens": {"T": 63, "keep": True},
    "many chunks, a decay": {"T": 330, "gate": 1, "keep": True, "end": True},
    "65 tokens": {"T": 65, "ahla": True, "keep": True},
    "two chunks and a token, a log gate": {"T": 129, "gate": 2, "keep": True},
    "a strong decay": {"T": 130, "gate": 1, "keep": True, "end": True, "strong": True},
    "many chunks": {"T": 450, "keep": True},
    "many chunks, ahla": {"T": 450, "ahla": True, "keep": True, "gate": 2},
    "states, a decay": {"T": 130, "gate": 1, "start": True, "end": True},
    "states, a log gate, factors": {
        "T": 150, "gate": 2, "start": True, "end": True, "keep": True, "factors": SCALED,
    },
    "ahla: states, a decay, factors": {
        "T": 150, "gate": 1, "ahla": True, "start": True, "end": True, "factors": SCALED,
    },
    "narrow": {"T": 70, "D": 72, "V": 120, "gate": 2, "keep": True},
    "64 keys": {"T": 70, "D": 40, "gate": 2, "keep": True, "end": True},
    "64 values, ahla": {"T": 70, "V": 24, "ahla": True, "gate": 1, "keep": True, "end": True},
    "64 values": {"T": 70, "V": 64, "keep": True, "end": True, "start": True},
    "rows at odd places": {"T": 70, "D": 33, "V": 101, "fast": False, "keep": True, "gate": 2},
    "states alone": {"T": 300, "gate": 2, "end": True, "read": False},
    "states alone, ahla": {"T": 300, "gate": 1, "end": True, "read": False, "ahla": True},
    "o in float32": {"T": 70, "V": 72, "gate": 1, "wide": True, "keep": True},
    "o in float32, 64 values, ahla": {"T": 140, "V": 64, "ahla": True, "wide": True},
    "heads, shared keys": {"T": 65, "heads": (2, 1, 2), "shared": ("k",), "gate": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name):
    case = Case(len(name), **CASES[name])
    case.run()
    for at in np.ndindex(*case.heads):
        made, o, *states = case.wanted(at)
        for x, want in ((case.y, made), (case.o, o)):
            if x is not None:
                assert off(x[at], want) < ROUNDED
        for x, want in zip(case.end, states, strict=True):
            if x is not None:
                assert off(x[at], want) < STATES


@pytest.mark.parametrize("ahla", [False, True])
def test_heads_that_share_states_and_y(ahla):
    """The first of them stores what they share."""
    names = ("k", "q") if not ahla else ("k", "q", "v")
    case = Case(3, T=65, heads=(1, 2, 2), shared=names, ahla=ahla, end=True, keep=True)
    lone = Case(3, T=65, heads=(1, 2, 2), shared=names, ahla=ahla, end=True, keep=True)
    args = list(case.args)
    place = hopper.pair_kernel.arg_names.index
    for name in ("sy", "se"):
        for axis in "012":
            args[place(name + axis)] = 0
    case.args = tuple(args)
    case.run()
    lone.run()
    for x, y in ((case.y, lone.y), (case.end[0], lone.end[0])):
        assert np.array_equal(x[0, 0, 0], y[0, 0, 0])
        assert np.isnan(x[0, 0, 1].astype(np.float64)).all()
    assert np.array_equal(case.o, lone.o)


@pytest.mark.parametrize(
    ("options", "scales"),
    [
        ({"T": 1, "end": True}, (1, 1, 1)),
        ({"T": 200, "keep": True}, (1, 1, 1)),
        ({"T": 300, "V": 64, "gate": 2, "keep": True, "start": True, "end": True}, (0.5, 0.5, 2)),
        ({"T": 330, "gate": 1, "keep": True, "start": True}, (0.5, 0.5, 2)),
        ({"T": 130, "D": 56, "V": 72, "gate": 1, "keep": True, "end": True}, (1, 1, 1)),
        ({"T": 65, "D": 33, "V": 101, "fast": False, "keep": True, "gate": 2}, (1, 1, 1)),
        ({"T": 70, "heads": (1, 1, 2), "shared": ("k",), "gate": 1, "wide": True}, (1, 1, 1)),
    ],
    ids=str,
)
def test_third_order(options, scales):
    case = Case(0, **options)
    D, V = case.k.shape[-1], case.v.shape[-1]
    random, T, keep = np.random.default_rng(1), case.v.shape[-2], options.get("keep", False)
    shapes = [(D, D), (D, V), (D, V)]

    def made(fill, dtype=np.float32, shapes=shapes):
        return [fill((*case.heads, *n)).astype(dtype) for n in shapes]

    nan = functools.partial(np.full, fill_value=np.nan)
    starts = made(random.standard_normal) if options.get("start") else [None] * 3
    ends = made(nan) if options.get("end") else [None] * 3
    y, u = made(nan, ml_dtypes.bfloat16, [(T, D), (T, V)]) if keep else (None, None)
    rows = (case.q, case.k, case.v, y, u, case.o)
    states = [x for pair in zip(starts, ends, strict=True) for x in pair]
    unit, gate = (8 if options.get("fast", True) else 1), case.gate
    gates = (0,) * 4 if gate == 0 else (*strides(case.g, gate - 1), 0)[:4]
    steps = [strides(x, 2, unit) for x in rows]
    steps += [(*x[:3], None, *x[3:]) for x in (strides(x, 2) for x in states)]
    tile = 64 * -(-D // 64)
    gluon_interpreter.run(
        hopper3.triple_kernel, (math.prod(case.heads) * -(-V // 64),), *rows, *states,
        *[None] * 7, case.g, *scales, None, T, None, D, V, *case.heads[1:],
        *(n for each in steps for n in each), *UNSUMMED, *gates, SUMS=False, DEN=False,
        exact=True, READ=True, WIDE=options.get("wide", False), KEEP_Y=keep, KEEP_U=keep,
        GATE=gate, POWER1=min(gate, 1), POWER2=3 * min(gate, 1), SCALED=scales != (1, 1, 1),
        **{f"START{i}": starts[0] is not None for i in (1, 2, 3)},
        **{f"END{i}": ends[0] is not None for i in (1, 2, 3)},
        BD=tile, WHOLE_D=tile == D, WHOLE_V=V % 64 == 0, FAST=unit == 8,
    )  # fmt: skip
    for at in np.ndindex(*case.heads):
        q, k, v = (
            x[tuple(0 if n == 1 else i for i, n in zip(at, x.shape, strict=False))].astype(float)
            for x in (case.q, case.k, case.v)
        )
        a = np.zeros(T) if gate == 0 else case.g[at].astype(float)
        a = np.log(a) * np.ones(T) if gate == 1 else np.maximum(a, -1e6)
        first = [np.zeros(n) if x is None else x[at] for x, n in zip(starts, shapes, strict=True)]
        *want, S, P, F = triple(q, k, v, a, 3, scales, *first)
        for x, wanted in zip((y, u, case.o), want, strict=True):
            if x is not None:
                assert off(x[at], wanted) < ROUNDED
        for x, wanted in zip(ends, (S, P, F), strict=True):
            if x is not None:
                assert off(x[at], wanted) < STATES


# Ahead of time
LOOSE = "narrow", "odd rows"
EVERYTHING = {"KEEP": True, "START1": True, "END1": True, "START2": True, "END2": True,
              "SCALED1": True, "SCALED2": True}  # fmt: skip
SHAPES = {
    "": {},
    "y stored": {"KEEP": True},
    "states": {"START1": True, "END1": True, "START2": True, "END2": True},
    "all": EVERYTHING,
    "states alone": {"READ": False, "END1": True, "END2": True},
    "64 keys": {"BD": 64},
    "64 values": {"BV": 64},
    "64": {"BD": 64, "BV": 64},
    "narrow": {},
    "o in float32": {"WIDE": True, "KEEP": True},
    "odd rows": {},
    "segments": {"START1": True, "START2": True},
    "denominators": {"SUMS": True, "DEN": True},
    "denominators, all": EVERYTHING | {"SUMS": True, "DEN": True},
    "states of denominators": EVERYTHING | {"SUMS": True, "READ": False},
    "segments, states alone": {"READ": False, "START1": True, "END2": True},
}
STATES3 = {f"{when}{i}": True for when in ("START", "END") for i in (1, 2, 3)}
THIRD = {
    "": {},
    "all": STATES3 | {"KEEP_Y": True, "KEEP_U": True, "SCALED": True},
    "64 keys": {"BD": 64},
    "o in float32": {"WIDE": True, "KEEP_Y": True},
    "segments, states alone": {"READ": False, "START1": True, "START2": True, "END3": True},
    "denominators, all": STATES3
    | {"KEEP_Y": True, "KEEP_U": True, "SCALED": True, "SUMS": True, "DEN": True},
}
KERNELS = [
    *(
        (name, gate, shape)
        for name in ("hla2", "ahla")
        for gate in (0, 1, 2)
        for shape in ("", "all")
    ),
    *((name, 2, shape) for name in ("hla2", "ahla") for shape in ("states alone", "64 keys")),
    *((name, 0, shape) for name in ("hla2", "ahla") for shape in ("64 values", "narrow")),
    *(("hla2", 0, shape) for shape in ("y stored", "states", "o in float32")),
    *((name, gate, "64") for name in ("hla2", "ahla") for gate in (0, 2)),
    ("ahla", 1, "odd rows"),
    *((name, 0, shape) for name in ("hla2", "ahla") for shape in SHAPES if "segments" in shape),
    ("hla2", 2, "segments"),
    ("hla2", 0, "denominators"),
    ("ahla", 0, "denominators, all"),
    ("hla2", 2, "denominators, all"),
    ("hla2", 2, "states of denominators"),
    *(("hla3", gate, "") for gate in (0, 1)),
    *(("hla3", 2, shape) for shape in THIRD),
]
# Bytes a thread, most of them where addresses are made; others 24
SPILLS = {"": 96, "segments": 176, "segments, states alone": 88, "states": 256, "all": 320,
          "o in float32": 256, "states alone": 128, "odd rows": 2048, "denominators": 80,
          "denominators, all": 448, "states of denominators": 160}  # fmt: skip
NEWER_SPILLS = SPILLS | {"": 248, "segments, states alone": 160, "states": 432, "all": 528,
                         "o in float32": 1016, "denominators": 192,
                         "denominators, all": 1152, "states alone": 136,
                         "states of denominators": 392}  # by that of CUDA 13  # fmt: skip
SHARED = 227 * 1024


def prepared(name, gate, shape):
    """Return what `ahead` compiles for one case."""
    kernel = hopper3.triple_kernel if name == "hla3" else hopper.pair_kernel
    names, last = kernel.arg_names, {"hla2": 2, "ahla": 1, "hla3": 3}[name]
    known = (n for n in names if re.fullmatch("[A-Z].+", n) and n not in ("N1", "N2"))
    given = dict.fromkeys(known, False) | {
        "AHLA": name == "ahla", "READ": True, "GATE": gate, "BD": 128, "BV": 128,
        "POWER1": min(gate, 1), "POWER2": min(gate, 1) * last,
        "WHOLE_D": shape not in LOOSE, "WHOLE_V": shape not in LOOSE, "FAST": shape != "odd rows",
    } | (THIRD if name == "hla3" else SHAPES)[shape]  # fmt: skip
    given = {n: x for n, x in given.items() if n in names}
    sums = given.get("SUMS") and shape[-1] != "s"  # all that there is of them
    present = {
        **dict.fromkeys(("p_x", "p_den", "p_one", "p_m", "p_me", "p_n", "p_ne"), sums),
        "p_y": given.get("KEEP") or given.get("KEEP_Y"), "p_u": given.get("KEEP_U"),
        "p_o": given.get("READ", True), "p_gate": gate > 0,
        **{f"p_{n.lower()}": x for n, x in given.items() if re.match("(START|END)[123]", n)},
    }  # fmt: skip
    signature, constants = {}, dict(given)
    for n in names:
        if n in given:
            signature[n] = "constexpr"
        elif n == "eps" and given.get("DEN"):
            signature[n] = "fp32"
        elif (
            n == "eps"
            or (re.fullmatch("tokens|s[sefhSPFmn]e?n", n) and "segments" not in shape)
            or (re.fullmatch("s(x|den|one|me?|ne?)[012ntdv]", n) and not present["p_" + n[1:-1]])
        ):
            signature[n], constants[n] = "constexpr", None
        elif not n.startswith("p_"):
            signature[n] = "fp32" if n.startswith("scale") else "i32"
        elif not present.get(n, True):
            signature[n], constants[n] = "constexpr", None
        else:
            narrow = n in ("p_q", "p_k", "p_v", "p_y", "p_u") or (n == "p_o" and not given["WIDE"])
            signature[n] = "*bf16" if narrow else "*fp32"
    return {
        "kernel": f"{kernel.__module__}.{kernel.__name__}", "gluon": True, "signature": signature,
        "constants": constants, "arch": 90, "options": {"num_warps": 4},
        "aligned": [n for n in names if signature[n] == "*bf16" and given["FAST"]],
    }  # fmt: skip


@pytest.mark.aot
@pytest.mark.parametrize("case", KERNELS, ids=named)
def test_compiled_for_the_hardware(compiled, case):
    found = compiled(prepared(*case))
    assert found["shared"] <= SHARED
    assert set(found["offsets"]) == {"i64"}  # none wraps beyond 2^31 elements
    assert not found["narrow"]  # nor does a product that is widened later
    assert found["wgmma"] > 0
    assert found["mma"] == 0
    spills = SPILLS if found["assembler"] < 13 else NEWER_SPILLS
    assert found["spills"] <= spills.get(case[2], 24)
    safe(found)
