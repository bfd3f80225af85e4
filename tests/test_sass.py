"""The searches of `sass` find what they search for, and nothing else."""

import pytest
from sass import Instruction, astray, hazards, misdescribed, serialised, written


def listing(*lines):
    """SASS as nvdisasm prints it; what begins with a point is a label."""
    rows = (x if x[0] == "." else f"        /*{i:04x}*/   {x} ;" for i, x in enumerate(lines))
    return "\n".join((".text.kernel:", *rows))


def products(*places):
    """One group of products that accumulate to R24..R87, by the first registers of operands."""
    first, last = "HGMMA.64x128x16.F32.BF16 R24, ", ", gdesc[UR8], R24"
    each = [f"{first}R{n}{last}" for n in places]
    return [*each[:-1], each[-1] + ", gsb0"]


WAIT, LEAVE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "EXIT"
TWO, ONE = products(88, 92), products(96)
LATE = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
LOOP = (".L_x_0:", "MOV R91, R2", *TWO, "FADD R3, R4, R5", "@P0 BRA `(.L_x_0)", WAIT, LEAVE)
APART = (".L_x_0:", "MOV R91, R2", *TWO, WAIT, "FADD R3, R4, R5", "@P0 BRA `(.L_x_0)", LEAVE)
SKIPPED = (*TWO, "@P0 BRA `(.L_x_0)", WAIT, ".L_x_0:", "MOV R88, R2", LEAVE)
PASSED = (*TWO, "BRA `(.L_x_1)", ".L_x_0:", "MOV R88, R2", ".L_x_1:", WAIT, "BRA `(.L_x_0)")
OTHER = (*TWO, "HGMMA.64x32x16.F32.BF16 R92, gdesc[UR4], RZ, !UPT, gsb0", WAIT)
LARGE = (*products(92), "HGMMA.64x128x16.F32.BF16 R32, gdesc[UR4], R32, gsb0", WAIT)


@pytest.mark.parametrize(("lines", "found"), [
    ((*TWO, "MOV R95, R2", WAIT), 1),
    ((*TWO, "MOV R96, R2", WAIT), 0),
    ((*TWO, WAIT, "MOV R95, R2"), 0),
    ((*TWO, "@!P3 LDS.128 R86, [R3]", WAIT), 1),
    ((*TWO, "STS.128 [R3], R88", WAIT), 0),
    ((*TWO, "SHFL.BFLY PT, R90, R2, 0x1, 0x1f", WAIT), 1),
    ((*TWO, "FSETP.GEU.AND P0, PT, R88, RZ, PT", WAIT), 0),
    ((*TWO, "CALL.REL.NOINC `($divide)", WAIT), 2),
    ((*TWO, *ONE, LATE, "MOV R95, R2", WAIT), 0),  # the older group is done
    ((*TWO, *ONE, LATE, "MOV R96, R2", WAIT), 1),  # the younger one is not
    ((*TWO[:1], "MOV R88, R2", WAIT, *TWO[1:], WAIT), 1),  # of no group yet
    (LOOP, 1),
    (APART, 0),
    (SKIPPED, 1),
    (PASSED, 0),
    (OTHER, 1),
    (LARGE, 1),
], ids=str)  # fmt: skip
def test_the_search_for_hazards_finds_one(lines, found):
    assert len(hazards(listing(*lines))) == found


def test_every_product_is_on_a_path():
    with pytest.raises(ValueError, match="products of lines"):
        hazards(listing(LEAVE, *TWO))
    two = "\n".join((listing(*TWO, LEAVE), listing(*TWO, "MOV R88, R2", LEAVE)))
    assert len(hazards(two)) == 1  # of two kernels the second


@pytest.mark.parametrize(("text", "registers"), [
    ("HGMMA.64x32x16.F32.BF16 R8, R40, gdesc[UR8], R8", range(8, 24)),
    ("HGMMA.64x32x16.F16 R8, gdesc[UR4], R8", range(8, 16)),
    ("HMMA.16816.F32.BF16 R8, R12, R16, R8", range(8, 12)),
    ("LDSM.16.MT88.4 R8, [R3+UR4]", range(8, 12)),
    ("IMAD.WIDE.U32 R8, P0, R3, 0x4, R4", range(8, 10)),
    ("I2F.F64.U32 R8, R3", range(8, 10)),
    ("F2F.F32.F64 R8, R4", [8]),
    ("LOP3.LUT P0, RZ, R8, 0x1, RZ, 0xc0, !PT", []),
    ("LOP3.LUT P0, R8, R9, 0x1, RZ, 0xc0, !PT", [8]),
    ("R2UR UR4, R8", []),
    ("BAR.SYNC R8, R9", []),
    ("NOP", []),
])  # fmt: skip
def test_registers_that_are_written(text, registers):
    assert written(Instruction(1, "", text)) == {*registers}


def test_the_search_for_serialised_products_finds_one():
    lines = (
        "ptxas info    : Used 168 registers, used 4 barriers",
        "ptxas info    : (C7517) Potential Performance Loss: a wait is put in",
        "ptxas info    : (C7520) Potential Performance Loss: wgmma.mma_async are serialized",
    )
    assert serialised("\n".join(lines)) == [lines[2]]


def test_the_search_for_astray_addresses_finds_one():
    mine = ["LDC R1, c[0x0][0x28]", "VIADD R1, R1, 0xfffff918", "STL.64 [R1+0x290], R8"]
    wrong = ["IADD3 R18, P2, R1, 0x20, RZ", "MOV R12, R1"]
    found = astray(listing(*mine, *wrong, "[R1]"))
    assert [x.split(maxsplit=1)[1] for x in found] == [f"{x} ;" for x in wrong]


PARAMETER, PLACE = (
    "ULDC UR14, c[0x0][0x294]",
    ("UIADD3 UR9, UR25, 0x7000, URZ", "USGXT.U32 UR14, UR9, 0xe"),
)
HIGH, BASE = "UMOV UR15, 0x40000040", "UMOV UR25, 0x400"
FIRST = ("UMOV UR12, UR14", "UMOV UR13, UR15")
DESCRIBED = "HGMMA.64x64x16.F32.BF16 R56, gdesc[UR12].tnspA, R56, gsb0"


@pytest.mark.parametrize(("lines", "found"), [
    ((BASE, *PLACE, HIGH, *FIRST, DESCRIBED), 0),
    ((PARAMETER, BASE, *PLACE, HIGH, *FIRST, DESCRIBED), 0),  # written over
    ((BASE, *PLACE, PARAMETER, "UIADD3 UR14, UP0, UR14, 0x2, URZ", HIGH, *FIRST, DESCRIBED), 1),
    ((BASE, *PLACE, HIGH, FIRST[0], DESCRIBED), 1),  # nothing writes UR13
    ((BASE, *PLACE, HIGH, DESCRIBED.replace("56, gdesc", "56, R24, gdesc")), 0),
    ((PARAMETER, HIGH, DESCRIBED.replace("56, gdesc", "56, R24, gdesc")), 1),
    ((BASE, *PLACE, PARAMETER.replace("14", "10"), "UIMAD.WIDE.U32 UR14, UR9, 0x3, URZ", HIGH,
      *FIRST, DESCRIBED), 0),  # a product reads single registers
    ((BASE, *PLACE, PARAMETER.replace("14", "10"), "UIADD3.64 UR14, UR9, UR4, URZ", HIGH, *FIRST,
      "UMOV UR4, 0x2", "UMOV UR5, 0x2", DESCRIBED), 3),  # UR10, and nothing writes UR4 in time
], ids=str)  # fmt: skip
def test_the_search_for_wrong_descriptors_finds_one(lines, found):
    """ptxas 12.8 made one of a stride where two buffers had one place in shared memory."""
    assert len(misdescribed(listing(*lines))) == found
