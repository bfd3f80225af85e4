"""The fused forward on Hopper, without one: interpreted against float64, compiled ahead of time.

Interpreted, every float is a float64 but what kernels store, so that what is wrong is no rounding;
partitions, copies and products are ordered at random (tests/gluon_interpreter.py). The searches
through compiled kernels are those of tests/test_kernels.py, and are marked `aot` as they are.
"""

import math
import re

import ml_dtypes
import numpy as np
import pytest
from conftest import installed
from test_kernels import compiled_cases, safe

installed("triton")
gluon_interpreter = installed("gluon_interpreter")
hopper = installed("hla.kernels.triton.hopper")

ROUNDED = 2e-3  # of one rounding to bfloat16, relative
STATES = 1e-6  # of states, which are float32


def sums(ahla, q, k, v, log_g, powers, factors, S, F):
    """(made, o, states) of one head in float64, token by token; y or u is what is made."""
    (read1, write1), (read2, write2) = factors
    made, o = [], []
    for q_t, k_t, v_t, a in zip(q, k, v, log_g, strict=True):
        S = math.exp(powers[0] * a) * S + write1 * np.outer(k_t, v_t if ahla else k_t)
        made.append(read1 * q_t @ S)
        keys, values = (k_t, made[-1]) if ahla else (made[-1], v_t)
        F = math.exp(powers[1] * a) * F + write2 * np.outer(keys, values)
        o.append(read2 * q_t @ F)
    return np.stack(made), np.stack(o), S, F


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
                 gate=0, start=False, end=False, keep=False, read=True, factors=((1, 1), (1, 1)),
                 fast=True, wide=False):  # fmt: skip
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
            self.g = random.uniform(0.9, 1, heads).astype(np.float32)
        elif gate == 2:
            self.g = -random.exponential(0.05, (*heads, T)).astype(np.float32)
            self.g[..., T // 3 : T : 40] = -np.inf
        powers = (1, 1) if ahla else (1, 2)
        (read1, write1), (read2, write2) = factors
        unit, BD, BV = 8 if fast else 1, 64 * -(-D // 64), 64 * -(-V // 64)
        arrays = (self.q, self.k, self.v, self.y, self.o, self.start[0], self.end[0],
                  self.start[1], self.end[1])  # fmt: skip
        steps = [strides(x, 2, unit if i < 5 else 1) for i, x in enumerate(arrays)]
        gates = (0,) * 4 if gate == 0 else (*strides(self.g, gate - 1), 0)[:4]
        steps = [x if i < 5 else (*x[:3], None, *x[3:]) for i, x in enumerate(steps)]
        self.args = (*arrays, self.g, read1 * write1, write1, 1 / write1,
                     read2 * write2, write2, 1 / write2, T, None, D, V, *heads[1:],
                     *(n for each in steps for n in each), *gates)  # fmt: skip
        self.constants = {
            "AHLA": ahla, "READ": read, "WIDE": wide, "KEEP": keep, "GATE": gate,
            "POWER1": powers[0] * (gate > 0), "POWER2": powers[1] * (gate > 0),
            "SCALED1": factors[0] != (1, 1), "SCALED2": factors[1] != (1, 1),
            "START1": start, "END1": end, "START2": start, "END2": end,
            "BD": BD, "BV": BV, "WHOLE_D": D == BD, "WHOLE_V": V == BV, "FAST": fast,
        }  # fmt: skip
        self.powers = powers
        self.run = lambda: gluon_interpreter.run(
            hopper.pair_kernel, (math.prod(heads),), *self.args, seed=seed, exact=True,
            **self.constants,
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


SCALED = ((0.5, 2.0), (3.0, -1.0))
CASES = {
    "one token": {"T": 1, "end": True},
    "63 tokens": {"T": 63, "keep": True},
    "64 tokens, a decay": {"T": 64, "gate": 1, "end": True},
    "65 tokens": {"T": 65, "ahla": True, "keep": True},
    "two chunks and a token, a log gate": {"T": 129, "gate": 2, "keep": True},
    "many chunks": {"T": 700, "keep": True},
    "many chunks, ahla": {"T": 700, "ahla": True, "keep": True, "gate": 2},
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
    "heads, shared keys": {"T": 65, "heads": (2, 1, 3), "shared": ("k",), "gate": 1},
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


# Ahead of time
GATED = {0: (0, 0), 1: (1, 2), 2: (1, 2)}
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
    "narrow": {"WHOLE_D": False, "WHOLE_V": False},
    "o in float32": {"WIDE": True, "KEEP": True},
    "odd rows": {"WHOLE_D": False, "WHOLE_V": False, "FAST": False},
    "segments": {"START1": True, "START2": True},
    "segments, states alone": {"READ": False, "START1": True, "END2": True},
}
KERNELS = [
    *((ahla, gate, shape) for ahla in (False, True) for gate in (0, 1, 2) for shape in ("", "all")),
    *((ahla, 2, shape) for ahla in (False, True) for shape in ("states alone", "64 keys")),
    *((ahla, 0, shape) for ahla in (False, True) for shape in ("64 values", "narrow")),
    *((False, 0, shape) for shape in ("y stored", "states", "o in float32")),
    (True, 1, "odd rows"),
    *((ahla, 0, shape) for ahla in (False, True) for shape in SHAPES if "segments" in shape),
    (False, 2, "segments"),
]
SPILLS = {"segments": 176, "segments, states alone": 32, "": 96, "y stored": 16, "narrow": 16, "states": 256, "all": 256,
          "states alone": 128, "odd rows": 2048}  # bytes a thread; others 16  # fmt: skip
SHARED = 227 * 1024


def prepared(ahla, gate, shape):
    """Return what `ahead` compiles for one case."""
    power1, power2 = GATED[gate]
    segments = "segments" in shape
    given = {
        "AHLA": ahla, "READ": True, "WIDE": False, "KEEP": False, "GATE": gate,
        "POWER1": power1, "POWER2": power1 if ahla else power2, "SCALED1": False, "SCALED2": False,
        "START1": False, "END1": False, "START2": False, "END2": False,
        "BD": 128, "BV": 128, "WHOLE_D": True, "WHOLE_V": True, "FAST": True,
    } | SHAPES[shape]  # fmt: skip
    present = {
        "p_q": True, "p_k": True, "p_v": True, "p_y": given["KEEP"], "p_o": given["READ"],
        "p_start1": given["START1"], "p_end1": given["END1"], "p_start2": given["START2"],
        "p_end2": given["END2"], "p_gate": gate > 0,
    }  # fmt: skip
    signature, constants, names = {}, dict(given), hopper.pair_kernel.arg_names
    for name in names:
        if name in given:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            wide = re.fullmatch("p_(start|end|gate).*", name)
            wide = wide or (name == "p_o" and given["WIDE"])
            signature[name] = "*fp32" if wide else "*bf16"
            if not present[name]:
                signature[name], constants[name] = "constexpr", None
        elif re.fullmatch("tokens|s[sefh]n", name) and not segments:
            signature[name], constants[name] = "constexpr", None
        else:
            signature[name] = "fp32" if re.match("scale|write|unwrite", name) else "i32"
    return {
        "kernel": "hla.kernels.triton.hopper.pair_kernel", "gluon": True,
        "signature": signature, "constants": constants, "arch": 90, "options": {"num_warps": 4},
        "aligned": [n for n in names if signature[n] == "*bf16" and given["FAST"]],
    }  # fmt: skip


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    cache = tmp_path_factory.mktemp("triton")
    found = compiled_cases([prepared(*case) for case in KERNELS], cache)
    return dict(zip(KERNELS, found, strict=True))


@pytest.mark.aot
@pytest.mark.parametrize("case", KERNELS, ids=lambda case: "-".join(map(str, case)))
def test_compiled_for_the_hardware(reports, case):
    found = reports[case]
    assert found["shared"] <= SHARED
    assert set(found["offsets"]) == {"i64"}  # none wraps beyond 2^31 elements
    assert not found["narrow"]  # nor does a product that is widened later
    assert found["wgmma"] > 0
    assert found["mma"] == 0
    assert found["spills"] <= SPILLS.get(case[2], 16)
    safe(found)
