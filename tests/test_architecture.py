"""No arrows back: a room imports only rooms that stand above it in docs/architecture.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import corematching

PACKAGE = Path(corematching.__file__).parent
FOUNDATION = ("texts", "errors", "files", "registry", "groups")
"""Modules beside the rooms that every room may import, in their own order."""
TOP = ("commands", "cli", "__main__", "__init__")
"""Modules beside the rooms that may import everything."""


def rooms() -> list[str]:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `corematching/(\w+)` \|", text, re.MULTILINE)


def imports_at_load(nodes: list[ast.stmt]) -> Iterator[str]:
    """Modules that are imported when a file is loaded; imports for type checkers and inside functions do not count."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "corematching":
            # Names of the public API come from the package itself; only rooms and modules are held to the order.
            yield from (f"corematching.{name.name}" for name in node.names if (PACKAGE / name.name).exists())
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from imports_at_load(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            yield from imports_at_load(node.body + [line for handler in node.handlers for line in handler.body])


def test_every_room_stands_in_the_table():
    found = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert found == set(rooms())


@pytest.mark.parametrize("room", [*FOUNDATION, *rooms()])
def test_a_room_imports_only_what_stands_above_it(room):
    order = [*FOUNDATION, *rooms()]
    allowed = set(order[: order.index(room) + 1])
    sources = sorted((PACKAGE / room).rglob("*.py")) if room in rooms() else [PACKAGE / f"{room}.py"]
    wrong = []
    for path in sources:
        for module in imports_at_load(ast.parse(path.read_text(encoding="utf-8")).body):
            parts = module.split(".")
            if parts[0] == "corematching" and len(parts) > 1 and parts[1] not in allowed:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert not wrong


def test_modules_beside_the_rooms_are_known():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*FOUNDATION, *TOP}
