"""The tests themselves: what they share is in lucid_testing, and no test module imports another one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def imported(source: str) -> set[str]:
    """The top-level names of the modules that a source imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # A relative import would be of the folder of the tests, whose modules are then its names.
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


def test_no_module_imports_a_test_module() -> None:
    files = sorted(TESTS.rglob("*.py"))
    modules = {path.stem for path in files if path.stem.startswith("test_")} | {"conftest"}
    assert len(modules) > 30
    found = {path.relative_to(TESTS).as_posix(): sorted(imported(path.read_text()) & modules) for path in files}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import test_isa",
        "import test_isa as isa",
        "from test_isa import call",
        "def f():\n    from test_isa import call",
        "from . import test_isa",
        "from .test_isa import call",
    ],
)
def test_such_an_import_is_found(source: str) -> None:
    assert imported(source) == {"test_isa"}


def test_what_the_tests_share_has_no_tests() -> None:
    """pytest would not collect them."""
    files = sorted((TESTS / "lucid_testing").glob("*.py"))
    assert len(files) > 5
    for path in files:
        names = [n.name for n in ast.parse(path.read_text()).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        assert [name for name in names if name.lower().startswith("test")] == [], path.name
