"""The map in ``tests/README.md``: it names the tests of every module, and only files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import tortoise_auth

TESTS = Path(__file__).parent
PACKAGE = Path(tortoise_auth.__file__).parent
ROWS = re.findall(r"^\| (.+) \| (.*) \|$", (TESTS / "README.md").read_text(), re.MULTILINE)


def named(cell: str) -> set[str]:
    """Return the Python files that a cell of the table names."""
    return set(re.findall(r"`([\w/]+\.py)`", cell))


MODULES = {path for subject, _ in ROWS for path in named(subject)}
FILES = {path for _, files in ROWS for path in named(files)}


def test_every_module_has_its_tests() -> None:
    """A module has a test file of its name, or a row of the map names it."""
    lost = []
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE)
        if path.stem.startswith("__") or "migrations" in module.parts:
            continue
        own = TESTS / module.with_name(f"test_{module.name}")
        if not own.exists() and module.as_posix() not in MODULES:
            lost.append(module.as_posix())
    assert lost == []


def test_every_test_file_is_on_the_map() -> None:
    """Each test file is named, except those of security, which are named by their ids."""
    files = {path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    missing = {path for path in files - FILES if not path.startswith("security/")}
    assert missing <= {"test_map.py"}


def test_leads_somewhere() -> None:
    """Every file that the map names exists."""
    assert {path for path in MODULES if not (PACKAGE / path).exists()} == set()
    assert {path for path in FILES if not (TESTS / path).exists()} == set()


def test_nothing_is_imported_from_a_test() -> None:
    """No test module or conftest is imported: shared code is in ``tests/support``."""
    forbidden = re.compile(
        r"^\s*(?:from|import) tests\.(?:\w+\.)*(?:test_\w+|conftest)\b", re.MULTILINE
    )
    assert [path.name for path in TESTS.rglob("*.py") if forbidden.search(path.read_text())] == []
