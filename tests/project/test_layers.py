"""Folders stand in one order, and imports point one way: docs/design.md draws it."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "userip_fast"


def drawn() -> list[str]:
    """The folders (and lone modules) in the order of the drawing in docs/design.md."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    return re.findall(r"^    ([a-z]+)(?:/|\.py) ", text.partition("## The way")[0], re.MULTILINE)


@cache
def modules() -> dict[str, Path]:
    """Dotted name below the package -> file; a folder's own name stands for its `__init__`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imported(name: str) -> frozenset[str]:
    """Modules of the package that a module imports, inside functions too; not for types alone."""
    out: set[str] = set()
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    of_types = [
        n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)
    ]
    skipped = {id(inner) for n in of_types for inner in ast.walk(n)}
    for node in (n for n in ast.walk(tree) if id(n) not in skipped):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "userip_fast":
            base = (node.module or "").partition(".")[2]
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                out.add(inner if inner in modules() else base)
        elif isinstance(node, ast.Import):
            names = (alias.name.partition(".")[2] for alias in node.names)
            out |= {n for n in names if n in modules()}
    return frozenset(out & modules().keys() - {name})


def layer(name: str) -> str:
    return name.split(".")[0]


def test_the_drawing_shows_every_folder():
    here = {layer(name) for name in modules()} - {"", "__main__", "_version"}
    assert set(drawn()) == here


@pytest.mark.parametrize("name", [n for n in modules() if n not in ("", "__main__")])
def test_imports_point_one_way(name):
    order = drawn()
    own = order.index(layer(name)) if layer(name) in order else -1
    up = [
        other
        for other in imported(name)
        if other not in ("", "_version") and order.index(layer(other)) > own
    ]
    assert not up, f"{name} imports from a folder below its own in docs/design.md"


def test_there_are_no_circles():
    """Within a folder either; an `__init__`, which shows names of its files, aside."""
    left = {n: set(imported(n)) for n in modules()}
    packages = {n for n, path in modules().items() if path.name == "__init__.py"}
    left = {n: others - packages for n, others in left.items() if n not in packages}
    while free := [n for n, others in left.items() if not others & left.keys()]:
        for n in free:
            del left[n]
    assert not left, f"circles among {sorted(left)}"


def test_what_is_imported_is_read_right():
    """The reading above finds what stands in functions, and modules imported by their folder."""
    assert "core._extension" in imported("ops.isa")
    assert any("em.table" in imported(n) for n in modules() if layer(n) == "model")
