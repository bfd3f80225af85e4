"""The fused Triton kernels compiled ahead of time, as test_kernels has the pass."""

import importlib
import re

import pytest
from test_kernels import SHARED, named, safe  # skips where there is no Triton

fused = importlib.import_module("hla.kernels.triton.fused")
chain_kernel = importlib.import_module("hla.kernels.triton.chain").chain_kernel

# Operator, gate, options of the kernel
KINDS = {
    f"{operator}, {gate}{also}": (operator, gate, options)
    for operator in ("hla2", "ahla", "hla3")
    for gate in (None, "decay", "log_gate")
    for also, options in (
        ("", {}),
        (", stored", {"Y": operator != "ahla", "U": operator != "hla2", "SCALED": True}),
        (", states", {"START": True, "END": True, "SUMS": True}),
        (", denominators", {"SUMS": True, "NORM": True}),
    )
}
CASES = [
    (kind, width, arch)
    for kind, (operator, gate, options) in KINDS.items()
    for width in (64, 128)
    for arch in (80, 90, 100)
    if arch == 90 or not options
    if fused.config(operator, width, width, "bf16", gate, arch // 10)
]
SPILLS = {
    ("hla2, None, states", 128): 16,
    ("hla2, None, denominators", 64): 16,
    ("hla2, None, denominators", 128): 376,
    ("hla2, decay, denominators", 64): 40,
    ("ahla, None, states", 128): 112,
    ("ahla, None, denominators", 128): 128,
    ("ahla, decay, states", 128): 208,
    ("ahla, decay, denominators", 128): 216,
    ("ahla, log_gate", 128): 16,
    ("ahla, log_gate, states", 128): 288,
    ("ahla, log_gate, denominators", 64): 24,
    ("ahla, log_gate, denominators", 128): 264,
    ("hla3, None, states", 64): 128,
    ("hla3, None, denominators", 64): 224,
}  # bytes a thread; others none


def prepared(kind, width, arch):
    """Return what `ahead` compiles for one case."""
    operator, gate, options = KINDS[kind]
    chosen = fused.config(operator, width, width, "bf16", gate, arch // 10)
    given = dict.fromkeys(
        ("SCALED", "SUMS", "NORM", "X", "DEN", "ONE", "Y", "U", "START", "END"), False
    )
    given |= {
        "KEYS": operator != "ahla", "VALUES": operator != "hla2",
        "POWER": {"hla2": 2, "ahla": 1, "hla3": 3}[operator],
        "GATE": (None, "decay", "log_gate").index(gate),
        "BD": width, "BV": width, "W": chosen.W, "WHOLE_D": True, "WHOLE_V": True,
        "OPERAND": "tl.bfloat16", "PRECISION": "bf16x6",
    } | options  # fmt: skip
    present = {f"p_{x.lower()}": given[x] for x in ("Y", "U", "X", "DEN", "ONE")}
    kept = {"S": given["KEYS"], "P": given["VALUES"], "F": True}
    kept |= {"m": given["VALUES"] and given["SUMS"], "n": given["SUMS"]}
    for state, there in kept.items():
        present |= {f"p_{state}": there and given["START"], f"p_{state}e": there and given["END"]}
    present["p_gate"] = gate is not None
    operands = [n for n in chain_kernel.arg_names if present.get(n, n[:2] == "p_")]
    narrow = ("p_q", "p_k", "p_v", "p_o", "p_y", "p_u")
    types = {n: "*bf16" if n in narrow else "*fp32" for n in operands}
    signature, constants = {}, dict(given)
    for name in chain_kernel.arg_names:
        signature[name] = "fp32" if name in ("inner", "outer", "eps") else types.get(name, "i32")
        left = re.fullmatch("sx[012td]", name) or (name == "eps" and not given["NORM"])
        if left or (name[:2] == "p_" and name not in types):
            constants[name] = None
        elif re.fullmatch(r"s[qkvoyu]d|s[SPF]e?v|s(?:den|one)[td]|s[mn]e?[dv]|sgt", name):
            constants[name] = 1
    signature |= dict.fromkeys(constants, "constexpr")
    assert len(signature) == len(chain_kernel.arg_names)
    even = [n for n in signature if signature[n][0] == "*" or re.match(r"s(?!g)\w+[0-9td]$", n)]
    return {
        "kernel": "hla.kernels.triton.chain.chain_kernel",
        "signature": signature,
        "constants": constants,
        "aligned": [n for n in even if signature[n] != "constexpr" and n != "p_gate"],
        "arch": arch,
        "options": {"num_warps": chosen.warps, "num_stages": chosen.stages},
    }


@pytest.mark.aot
@pytest.mark.parametrize("case", CASES, ids=named)
def test_compiled_for_the_hardware(compiled, case):
    kind, width, arch = case
    found = compiled(prepared(*case))
    assert found["registers"] <= 255
    assert found["shared"] <= SHARED.get(arch, SHARED[90])
    assert set(found["offsets"]) == {"i64"}
    assert not found["narrow"]
    assert found[{80: "mma", 90: "wgmma", 100: "tcgen05"}[arch]] > 0
    assert not found["unequal"]
    safe(found)
    if arch == 90:
        assert found["pipelined"] >= 3  # the search saw the loads
    assert found["spills"] <= SPILLS.get((kind, width), 0)
