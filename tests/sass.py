"""Searches through what an assembler made of a kernel: SASS as nvdisasm prints it, and its log.

The assemblers of Triton up to 3.7 can reuse the registers that hold a warpgroup product's first
operand before the product, which runs on by itself, has read them: wrong numbers, and no warning.
"""

import re
from typing import NamedTuple

SERIALISED = ("C7510", "C7512", "C7514", "C7520")  # warpgroup products one after the other
PRODUCT = re.compile(r"[A-Z]GMMA\.64x(\d+)x\d+\.([A-Z]+\d+)\S* +R(\d+), +(?:R(\d+)\S*,)?")
SILENT = {"BAR", "BRX", "CALL", "KILL", "NANOSLEEP", "R2P", "RET", "WARPSYNC"}  # write no register
WIDE = {"CS2R": 2, "DADD": 2, "DFMA": 2, "DMUL": 2, "LEPC": 2, "HMMA": 4, "IMMA": 4, "DMMA": 4}
CONVERSIONS = {"F2F", "F2I", "FRND", "I2F"}  # their first variant is the type of what they write
PARAMETERS = 0x210  # where they begin
MOST = 8  # groups of products that are told apart


class Instruction(NamedTuple):
    """One line of a listing: its number, the predicate in front, and its text without that."""

    line: int
    predicate: str
    text: str

    @property
    def name(self):
        """What it does, without its variants."""
        return self.text.split()[0].split(".")[0]


def instructions(code):
    """Return a listing's instructions, where each label stands among them, and where to begin."""
    found, labels, entries = [], {}, []
    for number, line in enumerate(code.splitlines(), 1):
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(found)
        elif line.startswith(".text."):
            entries.append(len(found))
        elif one := re.search(r"/\*[0-9a-f]{4,}\*/ +(@!?U?P\w+ +)?(\S.*?) *;", line):
            found.append(Instruction(number, (one[1] or "").strip(), one[2]))
    return found, labels, entries or [0]


def written(x):
    """Numbers of the registers that an instruction writes; of an unknown one as if it did."""
    if product := PRODUCT.match(x.text):
        n, kind, first = int(product[1]), product[2], int(product[3])
        return {*range(first, first + n // (4 if kind == "F16" else 2))}
    operands = [part.strip() for part in x.text.partition(" ")[2].split(",")]
    if re.fullmatch(r"P[0-6T]", operands[0]) and "SETP" not in x.name and x.name != "PLOP3":
        operands = operands[1:]
    register = re.fullmatch(r"R(\d+)(\.\w+)*", operands[0]) if operands else None
    if register is None or x.name in SILENT:
        return set()
    first, parts = int(register[1]), x.text.split()[0].split(".")
    n = WIDE.get(x.name, 1)
    if x.name == "LDSM":
        n = int(parts[-1]) if parts[-1].isdigit() else 1
    elif "128" in parts:
        n = 4
    elif {"64", "WIDE"} & {*parts} or (x.name in CONVERSIONS and parts[1][1:] == "64"):
        n = 2
    return {*range(first, first + n)}


def following(x, i, labels):
    """Places that control can reach from an instruction at ``i``."""
    jumps = x.name in ("BRA", "BRX")
    after = {labels[label] for label in re.findall(r"\.L_\w+", x.text)} if jumps else set()
    leaves = x.name in ("BRX", "EXIT", "RET") or (x.name == "BRA" and "," not in x.text)
    return after if leaves and not x.predicate else {*after, i + 1}


def hazards(code):
    """Writes to the first operand of a warpgroup product that may still read it, as texts.

    Every path is walked until nothing new is under way on it, so a loop's body as often as it
    takes. What a later product accumulates counts as written, and a call writes everything.
    """
    listing, labels, entries = instructions(code)
    found, seen, waiting = {}, set(), [(i, ((),)) for i in entries]
    while waiting:
        i, running = waiting.pop()  # groups of products: line, first register of the operand
        if (i, running) in seen or i == len(listing):
            continue
        seen.add((i, running))
        x = listing[i]
        product = PRODUCT.match(x.text)
        if product and product[4]:
            one = x.line, int(product[4])
            running = (*running[:-1], tuple(sorted({*running[-1], one})))
        touched = written(x) if any(running) else set()
        for line, first in (one for group in running for one in group):
            if touched & {*range(first, first + 4)} or x.name == "CALL":
                found[x.line, line] = f"line {x.line}, {x.text}: line {line} may still read that"
        if product and "gsb0" in x.text:
            running = (*running, ())
        elif wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)", x.text):
            left = max(0, len(running) - 1 - int(wait[1], 16))
            running = running[left:]
        if len(running) > MOST:
            running = (tuple(sorted({*running[0], *running[1]})), *running[2:])
        waiting += [(j, running) for j in following(x, i, labels)]
    reached = {i for i, _ in seen}
    missed = [x.line for i, x in enumerate(listing) if PRODUCT.match(x.text) and i not in reached]
    if missed:
        raise ValueError(f"no path leads to the products of lines {missed}")
    return [found[key] for key in sorted(found)]


def misdescribed(code):
    """Descriptors of warpgroup products that are made of a kernel's parameters, as texts.

    A matrix in shared memory is described by constants, its place and a counter of chunks. Looked
    back for are the last writes of the uniform registers that make up a descriptor. What a bitwise
    operation makes is looked at no further: bits of a counter, or a counter and the zero T >> 31,
    by which kernels keep an address from being made once for all chunks.
    """
    listing, found = instructions(code)[0], []
    for i, x in enumerate(listing):
        place = re.search(r"gdesc\[UR(\d+)\]", x.text) if x.name.endswith("GMMA") else None
        if place is None:
            continue
        first = 2 if PRODUCT.match(x.text)[4] else 0  # where the first operand is in R
        waiting = [(i, int(place[1]) + j) for j in range(first, 4)]
        seen = set(waiting)
        while waiting:
            j, register = waiting.pop()
            j = next((j for j in range(j - 1, -1, -1) if register in uniform(listing[j])), None)
            if j is None:
                found.append(f"line {x.line}, {x.text}: nothing writes UR{register}")
                continue
            y = listing[j]
            constant = re.search(r"c\[0x0\]\[(0x[0-9a-f]+)\]", y.text)
            if constant and int(constant[1], 16) >= PARAMETERS:
                found.append(f"line {x.line}, {x.text}: UR{register} is of line {y.line}, {y.text}")
            new = set() if y.name.startswith("ULOP3") else {(j, n) for n in reads(y)} - seen
            seen |= new
            waiting += new
    return found


def wide(x):
    """Whether an instruction is of pairs of uniform registers."""
    return bool({"64", "WIDE"} & {*x.text.split()[0].split(".")})


def reads(x):
    """Numbers of the uniform registers that an instruction reads; a wide one adds a pair."""
    operands = [re.findall(r"\bUR(\d+)", part) for part in x.text.split(",")[1:]]
    pairs = operands if "64" in x.text.split()[0].split(".") else operands[-1:] if wide(x) else []
    second = {int(n) + 1 for part in pairs for n in part}
    return {int(n) for part in operands for n in part} | second


def uniform(x):
    """Numbers of the uniform registers that an instruction writes."""
    one = re.match(r"[\w.]+ +(?:UP[0-6T], *)?UR(\d+)\b", x.text)
    return {int(one[1]), int(one[1]) + wide(x)} if one else set()


def serialised(log):
    """Lines of an assembler's log by which warpgroup products run one after the other."""
    return [line for line in log.splitlines() if any(f"({x})" in line for x in SERIALISED)]


def astray(code):
    """SASS that computes with the address of the stack, which nothing here asks for."""
    lines = [x.strip() for x in code.splitlines() if re.search(r"\bR1\b(?!\+0x|\])", x)]
    return [x for x in lines if not re.match(r"/\*\w+\*/ +[\w.]+ R1,", x)]
