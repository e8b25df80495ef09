"""The promises of concurrency and delivery on MariaDB with aiomysql, the driver that Tortoise takes second."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.support.services import needs_mariadb
from tests.support.snippets import ROOT

PROMISES = [
    "tests/database/test_mysql.py",
    "tests/database/test_commits.py",
    "tests/delivery",
    "tests/test_races.py",
    "tests/throttling/test_throttling.py::TestRaces",
]
"""One refresh of many wins, a burst of guesses is bounded, kills lose nothing, relays share rows."""


@pytest.mark.slow
@needs_mariadb
def test_promises_hold() -> None:
    """The tests of MariaDB that are about promises pass with the other driver, and none is skipped."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "tests.without_asyncmy"),
            *("-p", "no:cacheprovider", "-k", "mariadb or mysql", *PROMISES),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    passed = re.search(r"^(\d+) passed, \d+ deselected in", done.stdout, re.MULTILINE)
    assert passed, done.stdout[-500:]
    assert int(passed[1]) > 100
