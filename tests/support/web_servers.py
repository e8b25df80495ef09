"""A real server for an application, in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.snippets import ROOT

LIMIT = 60
"""Seconds after which a server that does not answer, or does not stop, fails the test."""


@contextmanager
def serving(app: str, tmp_path: Path) -> Iterator[int]:
    """Serve an application with uvicorn in a process of its own, and return its port.

    Connections wait in the socket, which is open before the server starts.
    """
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        (tmp_path / "log").open("w") as log,
    ):
        server = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", app, "--fd", str(listening.fileno())],
            pass_fds=[listening.fileno()],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "DATABASE_URL": f"sqlite://{tmp_path / 'app.sqlite3'}",
            },
            stderr=log,
            stdout=subprocess.DEVNULL,
        )
        try:
            yield listening.getsockname()[1]
        finally:
            server.terminate()
            assert server.wait(LIMIT) in (0, -15), (tmp_path / "log").read_text()
