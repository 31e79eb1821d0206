"""Test modules stand alone: what several of them need lies in `tests/helpers/` or `tests/reference/`."""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all modules that a syntax tree may import; of `from a import b` also `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def imports_a_test(tree: ast.AST) -> bool:
    return any(part.startswith("test_") for name in imported_modules(tree) for part in name.split("."))


def test_no_module_imports_a_test_module():
    files = sorted(TESTS.rglob("*.py"))
    assert len(files) > 50
    assert [str(file) for file in files if imports_a_test(ast.parse(file.read_text(encoding="utf-8")))] == []


def test_packages_hold_no_code():
    """A helper in an `__init__.py` is found by nobody."""
    packages = [
        file for file in TESTS.rglob("__init__.py") if len(ast.parse(file.read_text(encoding="utf-8")).body) > 1
    ]
    assert packages == []


def test_imports_are_found_in_every_form():
    for source in (
        "import tests.unit.test_a",
        "from .test_a import b",
        "from tests.unit import test_a",
        "def f():\n import test_a",
    ):
        assert imports_a_test(ast.parse(source)), source
    assert not imports_a_test(ast.parse("from tests.helpers import toy\nimport latest_news"))
