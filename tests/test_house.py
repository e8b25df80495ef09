"""The shape of the package: bounded modules and functions, and a service that only delegates."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tortoise_auth
from tortoise_auth import AuthService

PACKAGE = Path(tortoise_auth.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

LONGEST_MODULE = 500
LONGEST_FUNCTION = 50


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Return each function of a module with the lines of its body, without the docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                yield node.name, (body[-1].end_lineno or 0) - body[0].lineno + 1


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_too_long(path: Path) -> None:
    """A module has at most 500 lines, and a function at most 50."""
    source = path.read_text()
    assert source.count("\n") <= LONGEST_MODULE
    assert [each for each in functions(source) if each[1] > LONGEST_FUNCTION] == []


def test_long_functions_are_seen() -> None:
    """The check above detects a long function, and ignores docstrings."""
    source = 'def f():\n    """One.\n\n    Two.\n    """\n' + "    pass\n" * 51
    assert list(functions(source)) == [("f", 51)]


def test_the_service_is_a_front() -> None:
    """`AuthService` holds docstrings, and one call of a flow for each method."""
    source = (PACKAGE / "service.py").read_text()
    longest = {name: lines for name, lines in functions(source) if name != "__init__"}
    assert {"login", "refresh", "logout", "set_password", "deactivate"} <= longest.keys()
    (service,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == AuthService.__name__
    )
    for method in service.body:
        if isinstance(method, ast.AsyncFunctionDef):
            assert len(method.body) == 2, f"{method.name} does more than call a flow"
