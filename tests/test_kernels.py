"""The Triton pass compiled ahead of time, without a GPU: registers, shared memory, instructions.

For the launch table's own settings on Ampere and Hopper. Which arguments are there follows from
the kernel's own list of them. The searches through many compiled kernels take minutes: marked
`aot`, they run by `pytest -m aot`, with the Triton of another Python where HLA_TRITON_PYTHON names
one (it needs hla, and no torch).
"""

import importlib
import importlib.util
import re

import pytest
from ahead import overwritten

for name in ("torch", "triton"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed", allow_module_level=True)
launch = importlib.import_module("hla.kernels.triton.launch")
pass_kernel = importlib.import_module("hla.kernels.triton.causal").pass_kernel
SPILLS = {
    ("two values, decay", 128): 24,
    ("both, decay", 128): 128,
    ("adjoint", 128): 16,
    ("further keys, log gate", 64): 16,
    ("further keys, log gate", 128): 24,
    ("adjoint, decay", 128): 64,
    ("adjoint, both", 128): 88,
    ("adjoint, both; segments", 128): 96,
    ("gradient, decay", 64): 32,  # chunks of 64, faster all the same
    ("adjoint, decay", 64): 248,
}  # bytes a thread; others none
OLDER_SPILLS = SPILLS | {
    ("further keys, states", 128): 8,
    ("further keys, states; segments", 128): 16,
    ("gradient, decay", 64): 48,
}  # by ptxas 12
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block can have

ADJOINT = {"REVERSE": True, "DOT": True, "PAIRS": True}
# D, V, values that go with v, dtype, gate, options of the kernel
KINDS = {
    "plain": (0, 0, {}),
    "reverse, add": (0, 0, {"REVERSE": True, "ADD": True}),
    "decay": (0, 1, {}),
    "log gate": (0, 2, {}),
    "two values": ("V", 0, {}),
    "two values, decay": ("V", 1, {"V_IS_K": True}),
    "v is k, decay": (0, 1, {"V_IS_K": True}),
    "both, decay": (0, 1, {"REVERSE": True, "BOTH": True}),
    "denominator": (1, 0, {"START": True, "END": True}),
    "both": (0, 0, {"REVERSE": True, "BOTH": True}),
    "further keys": (0, 0, {"REVERSE": True, "BC": 16}),
    "further keys, decay": (0, 1, {"BC": 16}),
    "further keys, states": (0, 0, {"BC": 16, "START": True, "END": True}),
    "further keys, log gate": (0, 2, {"BC": 16, "DOT": True, "EVERY": 8}),
    "gradient": (0, 2, {"DOT": True, "START": True, "EVERY": 8, "WRITE": True}),
    "gradient, decay": (0, 1, {"DOT": True, "EVERY": 8}),
    "adjoint": (0, 2, ADJOINT | {"START": True, "END": True, "EVERY": 8}),
    "adjoint, decay": (0, 1, ADJOINT),
    "adjoint, both": (0, 1, ADJOINT | {"BOTH": True, "EVERY": 8}),
}
SEGMENTS = ("plain; segments", "no query; log gate; segments", "adjoint, both; segments",
            "further keys, states; segments")  # fmt: skip
MIRRORED = "v is k; none"
CASES = [
    (kind, width, dtype, arch)
    for dtype, kinds in (
        ("bf16", (*KINDS, *SEGMENTS)),
        ("fp32", ("plain", "log gate", "gradient", "adjoint", "adjoint; segments", MIRRORED)),
    )
    for kind in kinds
    for width in (64, 128)
    for arch in (80, 90)
    if dtype == "bf16" or width == (128 if arch == 90 else 64)  # keys that a tile holds
]


# Everything that changes which operands are read from registers, or which product is last.
SHAPES = {
    "plain": (0, {}),
    "v is k": (0, {"V_IS_K": True}),
    "both": (0, {"REVERSE": True, "BOTH": True}),
    "two values": ("V", {}),
    "two values, v is k": ("V", {"V_IS_K": True}),
    "denominator": (1, {}),
    "denominator, v is k": (1, {"V_IS_K": True}),
    "no query": (0, {"READ": False, "END": True}),
    "no query, v is k": (0, {"READ": False, "END": True, "V_IS_K": True}),
    "no query, denominator": (1, {"READ": False, "END": True}),
    "no query, two values": ("V", {"READ": False, "END": True}),
    "no query, both": (0, {"READ": False, "END": True, "REVERSE": True, "BOTH": True}),
    "no query, further keys": (0, {"READ": False, "END": True, "BC": 16}),
    "further keys": (0, {"BC": 16}),
    "64 values": (0, {"BV": 64}),
    "64 values, denominator": (1, {"BV": 64}),
}
WEIGHTS = {"none": (0, {}), "write": (0, {"WRITE": True, "START": True}), "decay": (1, {}),
           "log gate": (2, {})}  # fmt: skip
UNALIGNED = {"rows at odd strides": (0, 1, {"DOT": True})}  # a lane holds one value of a row
KINDS_OF_RACES = {
    f"{shape}; {weights}": (more, gated, one | other)
    for shape, (more, one) in SHAPES.items()
    for weights, (gated, other) in WEIGHTS.items()
}
RACES = [
    (kind, width, "bf16", 90)
    for kind in KINDS_OF_RACES
    for width in (64, 128)
    if width == 128 or not kind.startswith("64 values")
]  # which 64 keys have anyway
RACES += [(f"{kind}; segments", 128, "bf16", 90) for kind in ("no query; none", "plain; write")]


def prepared(kind, width, dtype, arch):
    """Return what `ahead` compiles for one case."""
    names = pass_kernel.arg_names
    kind, segments = kind.removesuffix("; segments"), kind.endswith("; segments")
    more, gated, options = (KINDS | KINDS_OF_RACES | UNALIGNED)[kind]
    V2 = width if more == "V" else more
    BV2, two = launch.tile(V2), V2 > 0
    operand = "bf16" if dtype == "bf16" else "float32"
    v_is_k = options.get("V_IS_K", False) and (dtype == "bf16" or gated > 0)
    mirrored = v_is_k or options.get("BOTH", False)
    weights = gated, options.get("WRITE", False), mirrored
    V = options.get("BV", width)
    gate = (None, "decay", "log_gate")[gated]
    chunk = launch.gate_chunk(width, V, gate, mirrored, arch // 10)
    chunk = (chunk if dtype == "bf16" else 32) if options.get("DOT") else 0
    read = options.get("READ", True)
    chosen = launch.config(width, V, V2, operand, *weights, arch // 10, chunk, read=read)
    given = {
        "READ": True, "UPDATE": True, "STRICT": False, "REVERSE": False, "GATE": gated,
        "WRITE": False, "ADD": False, "START": False, "END": False, "TWO": two, "BOTH": False,
        "DOT": False, "PAIRS": False, "EVERY": 0, "ROW": width, "V_IS_K": False,
        "BD": width, "BC": 0, "BV": width, "BV2": BV2, "LEADS": arch >= 90,
        "W": chosen.W, "WHOLE_D": True,
        "WHOLE_V": True, "WHOLE_V2": V2 == BV2,
        "PRECISION": "ieee" if dtype == "bf16" else "fp16x3",
        "OPERAND": "tl.bfloat16" if dtype == "bf16" else "tl.float32",
    } | options  # fmt: skip
    second = two or given["BC"] > 0  # a second state
    present = {  # of the operands that may be missing
        "p_v2": two, "p_o2": two, "p_start2": second and given["START"],
        "p_end2": second and given["END"], "p_x": given["DOT"], "p_dots": given["DOT"],
        "p_qc": given["BC"] > 0, "p_kc": given["BC"] > 0,
        "p_start": given["START"], "p_end": given["END"], "p_gate": gated > 0,
        "p_states": given["EVERY"] > 0,
    }  # fmt: skip
    states = ("p_start", "p_end", "p_start2", "p_end2", "p_gate", "p_dots", "p_qc",
              "p_kc")  # fmt: skip
    denominators = ("p_v2", "p_o2") if more == 1 else ()
    signature, constants = {}, dict(given)
    for name in names:
        if name in given:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            if not present.get(name, True):
                signature[name], constants[name] = "constexpr", None
            else:
                wide = "*fp64" if (name, dtype) == ("p_dots", "fp32") else "*fp32"
                signature[name] = wide if name in states + denominators else "*" + dtype
        elif name in ("read", "write"):
            signature[name] = "fp32"
        elif re.fullmatch(r"s(?:[qkvox]|v2|o2|qc|kc)d|s[se]2?v", name):  # the innermost stride
            signature[name], constants[name] = "constexpr", 1
        elif re.fullmatch(r"tokens|s[se]2?n", name) and not segments:
            signature[name], constants[name] = "constexpr", None
        else:
            signature[name] = "i32"
    unknown = set(given) - set(names)
    assert not unknown, f"the kernel has no {unknown}"
    stride = r"s\w+[0-9d]$" if kind in UNALIGNED else r"tokens|s\w+[0-9tdn]$"
    aligned = [n for n in names if signature[n][0] == "*" or re.match(stride, n)]
    return {
        "kernel": "hla.kernels.triton.causal.pass_kernel",
        "signature": signature,
        "constants": constants,
        "aligned": [n for n in aligned if signature[n] != "constexpr"],
        "arch": arch,
        "options": {"num_warps": chosen.warps, "num_stages": chosen.stages},
    }


def safe(found):
    """Assert that nothing is overwritten too early, and that products run on by themselves."""
    assert not found["races"]
    assert not found["hazards"]
    assert not found["astray"]
    assert not found["misdescribed"]
    assert found["assembled"]  # the search saw the assembler's log
    assert not found["serialised"]


def named(case):
    return "-".join(map(str, case))


ONCE = [prepared(*case) for case in CASES]
RACES = [case for case in RACES if prepared(*case) not in ONCE]  # what CASES have


def watched(found, kind):
    """Assert that the search for races saw the loads."""
    assert found["pipelined"] >= 2 - ("no query" in kind)


@pytest.mark.aot
@pytest.mark.parametrize("case", CASES, ids=named)
def test_compiled_for_the_hardware(compiled, case):
    kind, width, dtype, arch = case
    found = compiled(prepared(*case))
    assert found["registers"] <= 255
    assert found["shared"] <= SHARED[arch]
    assert set(found["offsets"]) == {"i64"}  # none wraps beyond 2^31 elements
    assert not found["narrow"]  # nor does a product that is widened later
    if dtype == "bf16":
        assert found["wgmma" if arch == 90 else "mma"] > 0
    safe(found)
    if (dtype, arch) == ("bf16", 90):
        watched(found, kind)
        spills = OLDER_SPILLS if found["assembler"] < 13 else SPILLS
        assert found["spills"] <= spills.get((kind, width), 0)


def carried(blocks, once, gated):
    """Return what `ahead` compiles of the kernel that carries states over segments."""
    names = importlib.import_module("hla.kernels.triton.carry").carry_kernel.arg_names
    constants = {"REVERSE": False, "ONCE": once, "BLOCKS": blocks, "E": 128, "ssv": 1, "sev": 1}
    constants["FOLLOWS"] = True
    constants |= {"sfn": 1} if gated else {"sfn": 0, "p_fading": None}
    signature = {n: "*fp32" if n.startswith("p_") else "i32" for n in names}
    signature |= {"p_fading": "*fp64"} | dict.fromkeys(constants, "constexpr")
    even = ("p_local", "p_o", "p_start", "p_end", "size", "V", "ssd", "sed")
    return {
        "kernel": "hla.kernels.triton.carry.carry_kernel", "signature": signature,
        "constants": constants, "aligned": even, "arch": 90,
        "options": {"num_warps": 1, "launch_pdl": True},
    }  # fmt: skip


@pytest.mark.aot
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("blocks", "once"), [(8, True), (16, False)])
def test_states_are_carried_in_registers(compiled, blocks, once, gated):
    """All loads of a run of segments are known, by 16 bytes; nothing is spilled or exchanged."""
    found = compiled(carried(blocks, once, gated))
    assert found["spills"] == 0
    assert set(found["offsets"]) == {"i64"}
    assert not found["narrow"]
    assert gated or not found["shuffles"]


def stepped(kernel, split, gate, once):
    """Return what `ahead` compiles of a kernel of one token of hla2, D and V 128."""
    module = importlib.import_module("hla.kernels.triton.token")
    names = getattr(module, kernel).arg_names
    constants = {"GATE": gate, "NORMALIZE": True, "SPLIT": split, "WHOLE": True, "ONCE": once}
    constants |= {"FOLLOWS": True, "R": 32, "BD": 128, "BV": 128, "BLOCKS": 4}
    constants |= dict.fromkeys(
        (n for n in names if re.fullmatch(r"s[qkvo]d|s[STFG]v|s[mn]d", n)), 1
    )
    absent = {"p_gate": not gate, "p_parts": not split}
    constants |= {n: None for n, left in absent.items() if left}
    constants = {n: x for n, x in constants.items() if n in names}
    signature = {n: "*fp32" if n.startswith("p_") else "i32" for n in names}
    signature |= dict.fromkeys({"p_q", "p_k", "p_v", "p_o"} & set(names), "*bf16")
    signature |= dict.fromkeys({"scale", "eps"} & set(names), "fp32")
    signature |= dict.fromkeys(constants, "constexpr")
    even = [n for n in names if re.fullmatch(r"p_\w+|s\w+[0-9d]|[DV]", n) and n not in constants]
    warps = 4 if kernel == "rows_kernel" else 1
    return {
        "kernel": f"hla.kernels.triton.token.{kernel}", "signature": signature,
        "constants": constants, "aligned": even, "arch": 90,
        "options": {"num_warps": warps, "launch_pdl": True},
    }  # fmt: skip


@pytest.mark.aot
@pytest.mark.parametrize(
    ("kernel", "split", "gate", "once"),
    [
        ("rows_kernel", True, 0, ""),
        ("rows_kernel", True, 2, ""),
        ("rows_kernel", False, 1, "evict_first"),
        ("add_kernel", True, 0, ""),
    ],
)
def test_a_token_is_kept_in_registers(compiled, kernel, split, gate, once):
    """Of states of a batch entry by many programs, whose parts of o are small, and by one."""
    found = compiled(stepped(kernel, split, gate, once))
    assert found["spills"] == 0
    assert split or (set(found["offsets"]) == {"i64"} and not found["narrow"])


@pytest.mark.aot
@pytest.mark.parametrize("case", RACES, ids=named)
def test_no_load_lands_on_what_a_product_still_reads(compiled, case):
    """Whatever a pass is asked for, by the launch table's settings on Hopper."""
    found = compiled(prepared(*case))
    safe(found)
    watched(found, case[0])


@pytest.mark.aot
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", UNALIGNED)
def test_lanes_that_store_one_sum_agree(compiled, kind, dtype):
    """All lanes of a row store its sum, to one place."""
    found = compiled(prepared(kind, 32, dtype, 90))
    assert found["shuffles"]
    assert not found["unequal"]


RACE = """
%k = ttg.local_alloc : () -> !ttg.memdesc<3x32x128xbf16, #shared>
%k0 = ttg.memdesc_index %k[%c0] : x
%l0 = ttg.async_copy_global_to_local %p0, %k0 mask %m : x
%k1 = ttg.memdesc_index %k[%c1] : x
%l1 = ttg.async_copy_global_to_local %p1, %k1 mask %m : x
%k2 = ttg.memdesc_index %k[%c2] : x
%l2 = ttg.async_copy_global_to_local %p2, %k2 mask %m : x
%r:2 = scf.for %i = %a to %b step %c iter_args(%S = %z) {
  %k3 = ttg.memdesc_index %k[%i3] : x
  %d = ttng.warp_group_dot %w, %k3, %S {isAsync = true} : x
  %k4 = ttg.memdesc_index %k[%i4] : x
  %l4 = ttg.async_copy_global_to_local %p4, %k4 mask %m : x
  scf.yield %d : x
"""


@pytest.mark.parametrize(
    ("copies", "wait", "reads", "found"),
    [
        (3, None, "%k3", ["d"]),
        (3, 1, "%k3", ["d"]),  # awaited when the next one has begun
        (3, 0, "%k3", []),
        (3, None, "%other", []),
        (4, None, "%k3", ["d"]),
        (4, 1, "%k3", []),
    ],
)
def test_the_search_for_races_finds_one(copies, wait, reads, found):
    code = RACE.replace("<3x", f"<{copies}x").replace("%w, %k3", f"%w, {reads}")
    if wait is not None:
        code = code.replace("  %k4", f"  ttng.warp_group_dot_wait %d {{pendings = {wait}}}\n  %k4")
    assert overwritten(code) == (found, 1)
