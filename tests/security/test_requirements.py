"""The page on security names a test, or a reason, for every requirement and every attack."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent.parent
PAGE = TESTS.parent / "docs" / "security.md"

REQUIREMENTS = {
    f"R{number}"
    for first, last in ((1, 13), (20, 28), (30, 39), (40, 49), (50, 63), (70, 80), (90, 96))
    for number in range(first, last + 1)
}
ATTACKS = {
    f"A{number}"
    for number in (
        *(1, 2, 3, 7, 8, 10, 11, 20, 21, 23, 25, 26, 29, 30, 31, 32, 34, 35, 36, 38),
        *(40, 41, 42, 44, 46, 47, 48, 50, 51, 52, 54, 56, 58, 59, 60, 63),
        *(70, 71, 72, 73, 75, 76, 77, 80, 81, 82, 83, 84, 85, 86, 89, 90, 91, 93, 94, 96, 97, 99),
        *(100, 103, 104, 105, *range(110, 120), 122, 123, 124, 125, 130, 131, 132, 133),
        *(137, 138, 139, 140, 141, *range(143, 150), 160, 161, 162, 163, 165, 166),
        *(169, *range(170, 176), 180, 182, 184, 185, 187),
    )
}

WITH_IDS = (
    *("test_attacks", "test_authentication", "test_environment", "test_logging", "test_passwords"),
    *("test_secrets", "test_sessions"),
)
"""The files of this folder whose tests begin their docstrings with ids."""

_IDS = re.compile(r"(?:[RA]\d+)(?:, [RA]\d+)*$")


def rows() -> Iterator[tuple[list[str], str]]:
    """Yield the ids and the rest of each row of the page's tables of ids."""
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and _IDS.match(cells[0]):
            yield cells[0].split(", "), " ".join(cells[1:])


def named(text: str) -> list[str]:
    """Return the node ids in a row."""
    return re.findall(r"`([\w/]+\.py::[\w:]+)`", text)


@cache
def docstrings(file: str) -> dict[str, str]:
    """Return the docstring of every test of a file, by the part of its node id after the file."""
    texts: dict[str, str] = {}

    def look(body: list[ast.stmt], inside: str) -> None:
        for each in body:
            if isinstance(each, ast.ClassDef):
                look(each.body, f"{inside}{each.name}::")
            elif isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
                if each.name.startswith("test_"):
                    texts[inside + each.name] = ast.get_docstring(each) or ""

    look(ast.parse((TESTS / file).read_text()).body, "")
    return texts


def ids_of(docstring: str) -> list[str]:
    """Return the ids with which a docstring begins."""
    before, colon, _ = docstring.partition(":")
    return before.split(", ") if colon and _IDS.match(before) else []


class TestPage:
    def test_every_id_is_there_once(self) -> None:
        """Each requirement and attack has one row with a test, or one with a reason, or both."""
        proven = [id_ for ids, text in rows() if named(text) for id_ in ids]
        explained = [id_ for ids, text in rows() if not named(text) for id_ in ids]
        assert set(proven) | set(explained) == REQUIREMENTS | ATTACKS
        assert len(proven) == len(set(proven))
        assert len(explained) == len(set(explained))

    def test_every_test_exists(self) -> None:
        """No row names a test that is not there."""
        named_tests = {node for _, text in rows() for node in named(text)}
        assert len(named_tests) > 100
        missing = []
        for node in sorted(named_tests):
            file, _, test = node.partition("::")
            if not (TESTS / file).exists() or test not in docstrings(file):
                missing.append(node)
        assert missing == []

    def test_every_reason_is_a_sentence(self) -> None:
        """A row without a test says why."""
        short = [ids for ids, text in rows() if not named(text) and len(text.split()) < 4]
        assert short == []

    def test_is_short(self) -> None:
        """The page has fewer than 320 lines, most of them rows of its tables."""
        assert len(PAGE.read_text().splitlines()) < 320


class TestIds:
    def test_every_test_here_says_what_it_proves(self) -> None:
        """Each test of these files begins with ids that exist."""
        for name in WITH_IDS:
            for test, docstring in docstrings(f"security/{name}.py").items():
                ids = ids_of(docstring)
                assert ids, f"{name}::{test}"
                assert set(ids) <= REQUIREMENTS | ATTACKS

    def test_every_row_knows_its_tests(self) -> None:
        """What a test says it proves, the page says too."""
        by_id = {id_: named(text) for ids, text in rows() if named(text) for id_ in ids}
        unknown = [
            f"{id_}: security/{name}.py::{test}"
            for name in WITH_IDS
            for test, docstring in docstrings(f"security/{name}.py").items()
            for id_ in ids_of(docstring)
            if f"security/{name}.py::{test}" not in by_id.get(id_, ())
        ]
        assert unknown == []
