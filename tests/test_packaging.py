"""What the package reports of itself to an installer."""

import re
from email import message_from_string
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import installed
from packaging.requirements import Requirement

import hla

ROOT = Path(__file__).parents[1]
TEXTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "hla").rglob("*.py")]


@pytest.fixture
def metadata(tmp_path, monkeypatch):
    """The metadata of the wheel that an installer would build."""
    build = installed("hatchling.build")
    monkeypatch.chdir(ROOT)
    folder = tmp_path / build.prepare_metadata_for_build_wheel(str(tmp_path))
    return message_from_string((folder / "METADATA").read_text(encoding="utf-8"))


@pytest.fixture
def requirements(metadata):
    return [Requirement(line) for line in metadata.get_all("Requires-Dist")]


def pinned(name):
    """The requirements of a constraints file."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def test_the_version_is_that_of_the_module(metadata):
    assert metadata["Version"] == hla.__version__


def test_requirements_are_lower_bounds(requirements):
    """A pin belongs to those who test, in constraints.txt, and not to those who install."""
    for requirement in requirements:
        assert all(bound.operator == ">=" for bound in requirement.specifier), requirement
    assert all(re.fullmatch(r"==[\d.]+", str(r.specifier)) for r in pinned("constraints.txt"))


def test_triton_is_required_only_where_it_is_published(requirements):
    found = [r for r in requirements if r.name == "triton"]
    assert found
    for requirement in found:
        (extra,) = re.findall(r'extra == "(\w+)"', str(requirement.marker))
        here = {"sys_platform": "linux", "platform_machine": "x86_64", "extra": extra}
        assert requirement.marker.evaluate(here)
        for other in ({"sys_platform": "darwin"}, {"platform_machine": "aarch64"}):
            assert not requirement.marker.evaluate(here | other)


def test_the_floors_that_ci_installs_are_those_of_the_metadata(requirements):
    """Pallas has a floor of its own: an older JAX has no kernels here."""
    requirements = [r for r in requirements if 'extra == "pallas"' not in str(r.marker)]
    for floor in pinned("constraints-floors.txt"):
        (pin,) = floor.specifier
        bounds = {str(r.specifier) for r in requirements if r.name == floor.name}
        assert len(bounds) == 1, f"{floor.name} is required as {bounds}"
        assert f"{pin.version}.".startswith(f"{bounds.pop().removeprefix('>=')}.")


@pytest.mark.floors
@pytest.mark.parametrize("floor", pinned("constraints-floors.txt"), ids=lambda r: r.name)
def test_a_floor_is_installed(floor):
    assert version(floor.name) in floor.specifier


def test_the_extras_have_what_the_suite_skips_for(requirements):
    """So that a new machine runs every test but those of other devices, and of the built pages."""

    def those(*extras):
        ours = [r for r in requirements if any(f'extra == "{x}"' in str(r.marker) for x in extras)]
        return {r.name.replace("-", "_") for r in ours}

    own = {
        "hla",
        "broken",
        "nowhere_to_be_found",
        *(x.stem for x in Path(__file__).parent.glob("*")),
    }
    everything = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        found = re.findall(r'installed\("([\w.]+)"\)', path.read_text(encoding="utf-8"))
        names = {re.sub(r"\W.*", "", name) for name in found}
        asked = {{"absl": "absl_py"}.get(name, name) for name in names}  # whose import differs
        extras = ("dev", "docs", "bench") if path.stem == "test_site" else ("test",)
        assert asked - own - {"cupy"} <= those(*extras), path.name
        everything |= asked
    assert {"threadpoolctl", "playwright"} <= everything


def test_extras_are_those_of_a_checkout(metadata):
    """No index has hla."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in TEXTS)
    assert not re.findall(r"pip install.*\bhla\[", text)
    named = set(re.findall(r'pip install.*"\.\[(\w+)\]"', text))
    assert {"triton", "demo", "bench", "test"} <= named <= set(metadata.get_all("Provides-Extra"))
