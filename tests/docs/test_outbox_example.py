"""The example of durable delivery: events that were stored before a crash are delivered after it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_delivers_each_once(tmp_path: Path) -> None:
    """A login of a killed process, a retried delivery and a dead letter are each delivered once."""
    inherited = {name: value for name, value in os.environ.items() if name != "SHOP_DATABASE"}
    finished = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / "outbox_relay.py"],
        cwd=tmp_path,
        env={**inherited, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    killed, started, retried, died, mended = _steps(finished.stdout)

    assert "it ended with SIGKILL" in killed
    assert re.search(r"^1 +user_login +mail\.new_login +1 +0 .* due$", killed, re.MULTILINE)
    assert _mails(killed) == []

    assert len(_mails(started)) == 1
    assert "rows delivered: 1" in started
    assert "Nothing waits." in started

    assert re.findall(r"log: Outbox row 2 .*failed, attempt (\d)", retried) == ["1", "2"]
    assert len(_mails(retried)) == 1

    assert "log: Outbox row 3 (user_login for mail.new_login) is a dead letter after 3" in died
    assert re.search(r"^3 .* dead +ConnectionError: the mail server is down$", died, re.MULTILINE)
    assert _mails(died) == []

    assert "Rows that start again: 1" in mended
    assert "No dead letters." in mended
    assert len(_mails(mended)) == 1
    assert len(set(_mails(finished.stdout))) == 3


def _steps(output: str) -> list[str]:
    """Return what each step printed, without its title."""
    return [step.partition("\n")[2] for step in output.strip().split("\n\n")]


def _mails(output: str) -> list[str]:
    """Return the ids of the events that mails were sent for."""
    return re.findall(r"mail to ada@example\.com: there was a login \((\S+)\)", output)
