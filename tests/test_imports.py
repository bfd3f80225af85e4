"""The layout as a law: imports point one way, without circles; sizes stay within bounds.

A module may import its own floor and the floors below it, wherever the import stands (those for
type checkers alone are none). What the tree does not keep yet is listed, and the lists shrink: an
entry that is no longer needed fails.
"""

import ast
import io
import pathlib
import tokenize

import pytest

import hla

ROOT = pathlib.Path(hla.__file__).parent
FLOORS = {  # from the bottom; a module belongs to the longest name that it starts with
    "leaves": ("contract", "errors", "options"),
    "core": ("core", "states"),
    "device": ("device",),
    "kernels": ("kernels",),
    "backends": ("backends",),
    "libraries": ("libraries",),
    "dispatch": ("dispatch",),
    "api": ("",),
    "package": ("__init__",),
    "programs": ("__main__", "bench", "cli", "command", "demo", "machine", "tables"),
}
ORDER = list(FLOORS)
FRAMEWORKS = ("cupy", "jax", "numba", "torch", "triton")
TAUGHT = ("libraries", "backends", "kernels", "programs")  # floors that may import frameworks
ADAPTER, CORE, FUNCTION = 150, 1200, 80  # lines of code

LARGE = dict[str, int]()  # function, adapter or "core": lines of code, which may only become fewer


def modules():
    """Every module of the package by its name without the package's."""
    found = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = file
    return found


MODULES = modules()
TREES = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}


def floor(name):
    """The floor of a module; one of no folder and no other floor is of the API."""
    fits = [
        (len(start), ORDER.index(level))
        for level, starts in FLOORS.items()
        for start in starts
        if start in ("", name) or name.startswith(start + ".")
    ]
    return max(fits)[1]


def statements(tree):
    """Every import of a module but those for type checkers alone."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        waiting += ast.iter_child_nodes(node)


def imported(name):
    """What a module imports: modules of the package, and names of other packages."""
    package = name.split(".") if MODULES[name].stem == "__init__" else name.split(".")[:-1]
    package = [] if name == "__init__" else package
    own, others = set(), set()
    for node in statements(TREES[name]):
        if isinstance(node, ast.Import):
            found = [x.name for x in node.names]
        elif node.level:
            base = package[: len(package) - node.level + 1]
            base += node.module.split(".") if node.module else []
            found = [".".join(["hla", *base, x.name]) for x in node.names]
        else:
            found = [f"{node.module}.{x.name}" for x in node.names]
        for full in found:
            first, _, rest = full.partition(".")
            if first != "hla":
                others.add(first)
                continue
            while rest and rest not in MODULES:  # a name in a module
                rest = rest.rpartition(".")[0]
            own.add(rest or "__init__")
    return own - {name}, others


IMPORTS = {name: imported(name) for name in MODULES}


def kept(found, listed, what):
    """Assert that nothing new is found, and that nothing listed is gone."""
    assert not found - listed, f"{what}: {sorted(found - listed)}"
    assert not listed - found, f"no longer needed, delete from the list: {sorted(listed - found)}"


def test_imports_point_one_way():
    found = {(m, x) for m, (own, _) in IMPORTS.items() for x in own if floor(x) > floor(m)}
    assert not found, f"imports of a higher floor ({' < '.join(ORDER)})"


def test_imports_have_no_circle():
    left = {m: own for m, (own, _) in IMPORTS.items()}
    while ends := {m for m, own in left.items() if not own & left.keys()}:
        left = {m: own for m, own in left.items() if m not in ends}
    assert not left, f"circles among {sorted(left)}"


def test_leaves_import_nothing_but_leaves():
    for name in MODULES:
        if floor(name) == ORDER.index("leaves"):
            assert all(floor(x) == floor(name) for x in IMPORTS[name][0]), name


def test_no_framework_outside_its_floor():
    """Libraries, backends and kernels alone import one; device no array library at all."""
    for name, (_, others) in IMPORTS.items():
        level = ORDER[floor(name)]
        forbidden = set() if level in TAUGHT else {*FRAMEWORKS}
        forbidden |= {"array_api_compat", "numpy"} if level == "device" else set()
        assert not others & forbidden, name


def test_core_names_no_framework():
    """Not in a string or a name either; docstrings may."""
    found = set()
    for name, tree in TREES.items():
        if floor(name) != ORDER.index("core"):
            continue
        texts = docstrings(tree)
        words = {
            str(x).lower()
            for node in ast.walk(tree)
            if node not in texts
            for field, x in ast.iter_fields(node)
            if field in ("id", "attr", "name", "value", "arg") and isinstance(x, str)
        }
        found |= {(name, f) for f in FRAMEWORKS for word in words if f in word}
    assert not found, "frameworks named"


def docstrings(tree):
    """The nodes of a tree that are docstrings."""
    return {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and ast.get_docstring(node, clean=False) is not None
    }


def code_lines(name):
    """Numbers of the lines of a module that hold code: no comment, blank or docstring alone."""
    texts = {n for x in docstrings(TREES[name]) for n in range(x.lineno, x.end_lineno + 1)}
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
             tokenize.ENCODING, tokenize.ENDMARKER)  # fmt: skip
    tokens = tokenize.tokenize(io.BytesIO(MODULES[name].read_bytes()).readline)
    lines = (range(t.start[0], t.end[0] + 1) for t in tokens if t.type not in empty)
    return {n for held in lines for n in held} - texts


def test_sizes():
    """Adapters, core as a whole, and every function outside kernels."""
    found = {"core": sum(len(code_lines(m)) for m in MODULES if m.split(".")[0] == "core")}
    limits = {"core": CORE}
    for name, tree in TREES.items():
        lines = code_lines(name)
        if name.startswith("backends."):
            found[name], limits[name] = len(lines), ADAPTER
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                one = f"{name}.{node.name}"
                if not name.startswith("kernels."):
                    held = lines & {*range(node.lineno, node.end_lineno + 1)}
                    found[one], limits[one] = len(held), FUNCTION
    large = {x: n for x, n in found.items() if n > limits[x]}
    assert not {x: n for x, n in large.items() if n > LARGE.get(x, 0)}, "over the limit"
    kept(set(large), set(LARGE), "over the limit")


@pytest.mark.parametrize(("name", "level"), [
    ("core.passes", "core"), ("libraries", "libraries"), ("api", "api"), ("layout", "api"),
    ("contract", "leaves"), ("bench.measure", "programs"), ("__init__", "package"),
    ("kernels.triton.launch", "kernels"), ("corelike", "api"),
])  # fmt: skip
def test_floors(name, level):
    assert ORDER[floor(name)] == level
