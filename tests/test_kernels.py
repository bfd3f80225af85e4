"""The Triton pass compiled ahead of time, without a GPU: registers, shared memory, instructions.

For the launch table's own settings on Ampere and Hopper. One process compiles all, without the
interpreter; which arguments are there follows from the kernel's own list of them.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import hla

pytest.importorskip("torch")
triton = pytest.importorskip("triton")
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block can have

# D, V, values that go with v, dtype, gate, options of the kernel
KINDS = {
    "plain": (0, 0, {}),
    "reverse, add": (0, 0, {"REVERSE": True, "ADD": True}),
    "decay": (0, 1, {}),
    "log gate": (0, 2, {"POWER": 2}),
    "two values": ("V", 0, {}),
    "mass": (1, 0, {"START": True, "END": True}),
    "both": (0, 0, {"REVERSE": True, "BOTH": True}),
    "adjoint": (0, 2, {"REVERSE": True, "DOT": True, "START": True, "END": True, "POWER": 3}),
}
CASES = [
    (kind, width, dtype, arch)
    for dtype, kinds in (("bf16", KINDS), ("fp32", ("plain", "log gate")))
    for kind in kinds
    for width in (64, 128)
    for arch in (80, 90)
    if dtype == "bf16" or width == 64  # of float32 keys a tile holds 64
]


def compiled(kind, width, dtype, arch):
    """Compile one case; return what the assembler and the code say of it."""
    import re
    import tempfile

    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hla.kernels import triton_launch
    from hla.kernels.triton_pass import pass_kernel as kernel

    names = kernel.arg_names
    more, gated, options = KINDS[kind]
    V2 = width if more == "V" else more
    BV2, two = triton_launch.tile(V2), V2 > 0
    size = 2 if dtype == "bf16" else 4
    chosen = triton_launch.config(width, width, V2, size, gated, arch == 90)
    given = {
        "READ": True, "UPDATE": True, "STRICT": False, "REVERSE": False, "GATE": gated, "POWER": 1,
        "WRITE": False, "ADD": False, "START": False, "END": False, "TWO": two, "BOTH": False,
        "DOT": False,
        "V_IS_K": False, "BD": width, "BV": width, "BV2": BV2, "W": chosen.W, "WHOLE_D": True,
        "WHOLE_V": True, "WHOLE_V2": V2 == BV2, "PRECISION": "tf32x3",
        "OPERAND": tl.bfloat16 if size == 2 else tl.float32,
    } | options  # fmt: skip
    present = {  # of the operands that may be missing
        "p_v2": two, "p_o2": two, "p_start2": two and given["START"],
        "p_end2": two and given["END"], "p_x": given["DOT"], "p_dots": given["DOT"],
        "p_start": given["START"], "p_end": given["END"], "p_gate": gated > 0,
    }  # fmt: skip
    states = ("p_start", "p_end", "p_start2", "p_end2", "p_gate", "p_dots")
    masses = ("p_v2", "p_o2") if more == 1 else ()
    signature, constants = {}, dict(given)
    for name in names:
        if name in given:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            if not present.get(name, True):
                signature[name], constants[name] = "constexpr", None
            else:
                signature[name] = "*fp32" if name in states + masses else "*" + dtype
        elif name in ("read", "write"):
            signature[name] = "fp32"
        elif re.fullmatch(r"s(?:[qkvox]|v2|o2)d|s[se]2?v", name):  # the innermost stride
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
    unknown = set(given) - set(names)
    assert not unknown, f"the kernel has no {unknown}"
    aligned = [n for n in names if signature[n][0] == "*" or re.match(r"s\w+[0-9td]$", n)]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(names.index(n),): x for n, x in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned
               if signature[n] != "constexpr"},
    )  # fmt: skip
    made = triton.compile(
        source, target=GPUTarget("cuda", arch, 32),
        options={"num_warps": chosen.warps, "num_stages": chosen.stages},
    )  # fmt: skip
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", done.stdout + done.stderr)
    registers, stack, _, local = map(int, usage.groups())
    code = made.asm["ttir"]
    return {
        "registers": registers,
        "spills": stack + local,
        "shared": made.metadata.shared,
        "wgmma": made.asm["ptx"].count("wgmma.mma_async"),
        "mma": made.asm["ptx"].count("mma.sync"),
        "offsets": re.findall(r"tt\.addptr [^\n]*, tensor<[^>]*x(i\d+)[,>]", code)
        + re.findall(r"tt\.addptr [^\n]*!tt\.ptr<\w+>, (i\d+)", code),
        "narrow": re.findall(r"muli %(?!c)\w+, %(?!c)\w+ : (?:tensor<\w*x)?i32", code),
    }


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """All cases, compiled in one process that is not interpreted."""
    code = f"import json, test_kernels as t; print(json.dumps([t.compiled(*c) for c in {CASES!r}]))"
    path = [str(pathlib.Path(hla.__file__).parent.parent), str(pathlib.Path(__file__).parent)]
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(path),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_compiled_for_the_hardware(reports, case):
    _, _, dtype, arch = case
    found = reports[case]
    assert found["registers"] <= 255
    assert found["shared"] <= SHARED[arch]
    assert set(found["offsets"]) == {"i64"}  # none wraps beyond 2^31 elements
    assert not found["narrow"]  # nor does a product that is widened later
    if dtype == "bf16":
        assert found["wgmma" if arch == 90 else "mma"] > 0
    if (dtype, arch) == ("bf16", 90):
        assert found["spills"] == 0
