"""Compile Triton's kernels ahead of time, without a GPU, and report what came out.

    python ahead.py < cases > reports

Needs hla and Triton, of any version, and no torch. A case is a line of JSON: the kernel's place,
its signature and constants by argument, the arguments that are multiples of 16, the architecture
and the options. Its report is a line too.
"""

import contextlib
import importlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from sass import astray, hazards, misdescribed, serialised


def overwritten(code):
    """Products of a TTGIR loop that may still read what a load of a later chunk overwrites.

    A product of chunk i reads copy i % n of an operand, and the loads of chunk j, which come after
    `ahead` others, fill copy (j + ahead) % n: the same one where n <= ahead + j - i.
    """
    copies, views, ahead, found = {}, {}, {}, set()
    before, _, rest = code.partition("scf.for")
    body = rest.partition("scf.yield")[0]
    lines = [(None, line) for line in before.splitlines()]
    lines += [(chunk, line) for chunk in range(2) for line in body.splitlines()]
    running = {}  # what each product that is not yet awaited reads, by its name and chunk
    for chunk, line in lines:
        if made := re.search(r"%(\S+) = ttg.local_alloc : \(\) -> !ttg.memdesc<(\d+)x", line):
            copies[made[1]] = int(made[2])
        elif view := re.search(r"%(\S+) = ttg.memdesc_(?:index|trans) %([\w-]+)", line):
            views[view[1]] = views.get(view[2], view[2])
        elif load := re.search(r"ttg.async_copy_global_to_local \S+ %([\w-]+)", line):
            into = views[load[1]]
            if chunk is None:
                ahead[into] = ahead.get(into, 0) + 1
                continue
            for (name, begun), reads in running.items():
                if into in reads and copies[into] <= ahead[into] + chunk - begun:
                    found.add(name)
        elif dot := re.search(r"%(\S+) = ttng.warp_group_dot %([\w-]+), %([\w-]+),", line):
            running[dot[1], chunk] = {views.get(dot[2]), views.get(dot[3])}
        elif wait := re.search(r"warp_group_dot_wait .*pendings = (\d+)", line):
            running = dict(list(running.items())[len(running) - int(wait[1]) :])
    return sorted(found), len(ahead)


def unequal(code):
    """Products in PTX that lanes exchange: each may fuse its own with the sum, and lanes differ."""
    made = re.findall(r"^\s*(\w[\w.]*)\s+\{?(?:_, )?(%\w+)\}?, (%\w+)", code, re.MULTILINE)
    by, found = {name: (how, of) for how, name, of in made}, []
    for name in re.findall(r"shfl\.sync\.bfly\.b32\s+%\w+, (%\w+)", code):
        how, of = by.get(name, ("", ""))
        while how.startswith(("mov", "cvt.u32.u64")) and of in by:
            how, of = by[of]
        found += [name] if how.startswith("mul") else []
    return found


def built(case):
    """Compile a case; return what Triton made of it and the assembler's log."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = case["kernel"].rpartition(".")
    kernel = getattr(importlib.import_module(module), name)
    places = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    of = ASTSource
    if case.get("gluon"):
        from triton.experimental.gluon._runtime import GluonASTSource as of
    source = of(
        kernel,
        case["signature"],
        {
            places[n]: getattr(tl, x[3:]) if str(x).startswith("tl.") else x
            for n, x in case["constants"].items()
        },
        {places[n]: [["tt.divisibility", 16]] for n in case["aligned"]},
    )
    log = io.StringIO()
    target = GPUTarget("cuda", case["arch"], 32)
    with contextlib.redirect_stdout(log):
        made = triton.compile(source, target=target, options=case["options"])
    return made, log.getvalue()


def disassembled(tool, file, *options):
    """Return a cubin as text, with ``-ndf`` without an analysis that takes a third of the time."""
    command = [tool, "-c", *options, file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def report(made, log):
    """Return what there is to know of a compiled kernel."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
        sass = disassembled(tool.with_name("nvdisasm"), file.name, "-ndf")
        if "BRX" in sass:  # whose targets the analysis of what flows where finds
            sass = disassembled(tool.with_name("nvdisasm"), file.name)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", done.stdout + done.stderr)
    registers, stack, _, local = map(int, usage.groups())
    gluon = "ttir" not in made.asm  # whose loads follow no schedule of the compiler
    races, pipelined = ([], 0) if gluon else overwritten(made.asm["ttgir"])
    code = made.asm["ttgir" if gluon else "ttir"]
    return {
        "triton": triton.__version__,
        "assembler": float(get_ptxas(made.metadata.target.arch).version),
        "races": races,
        "pipelined": pipelined,
        "hazards": hazards(sass),
        "serialised": serialised(log),
        "assembled": "Used" in log,
        "astray": astray(sass),
        "misdescribed": misdescribed(sass),
        "shuffles": made.asm["ptx"].count("shfl.sync.bfly"),
        "unequal": unequal(made.asm["ptx"]),
        "registers": registers,
        "spills": stack + local,
        "shared": made.metadata.shared,
        "wgmma": made.asm["ptx"].count("wgmma.mma_async"),
        "mma": made.asm["ptx"].count("mma.sync"),
        "tcgen05": made.asm["ptx"].count("tcgen05.mma"),
        "offsets": re.findall(r"tt\.addptr [^\n]*, tensor<[^>]*x(i\d+)[,>]", code)
        + re.findall(r"tt\.addptr [^\n]*!tt\.ptr<\w+>, (i\d+)", code),
        "narrow": re.findall(r"muli %(?!c)\w+, %(?!c)\w+ : (?:tensor<\w*x)?i32", code),
    }


if __name__ == "__main__":
    os.environ |= {"TRITON_INTERPRET": "0", "TRITON_DUMP_PTXAS_LOG": "1"}
    for case in sys.stdin:
        print(json.dumps(report(*built(json.loads(case)))), flush=True)
