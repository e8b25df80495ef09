"""Passlib over libpass is reported when the library is imported, with the command that mends it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.passwords.installation import require_libpass

COMMAND = "pip uninstall -y passlib && pip install --force-reinstall --no-deps libpass"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a package ``passlib`` that is found instead of the installed one."""
    folder = tmp_path / "passlib"
    folder.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [each for each in sys.modules if each.partition(".")[0] == "passlib"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    return folder


class TestRequireLibpass:
    def test_installed(self) -> None:
        """What these tests run with is libpass."""
        require_libpass()

    @pytest.mark.parametrize("version", ["1.8.0", "1.9.4", "2.0", "1.10.0.dev1"])
    def test_libpass(self, installed: Path, version: str) -> None:
        """Its versions are those after the last one of passlib."""
        (installed / "__init__.py").write_text(f'"""..."""\n\n__version__ = "{version}"\n')
        require_libpass()

    @pytest.mark.parametrize("version", ["1.7.4", "1.7.3", "1.6"])
    def test_passlib(self, installed: Path, version: str) -> None:
        """Files of passlib are refused, and the text has the command."""
        (installed / "__init__.py").write_text(f"__version__ = '{version}'\n")
        with pytest.raises(ConfigurationError) as refused:
            require_libpass()
        assert COMMAND in str(refused.value)

    def test_what_an_uninstalled_passlib_leaves(
        self, installed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Removing passlib removes files of libpass, so that a folder without a module is left."""
        (installed / "handlers").mkdir()
        monkeypatch.setattr(sys, "path", [str(installed.parent)])
        with pytest.raises(ConfigurationError, match="took files of libpass along"):
            require_libpass()

    def test_unreadable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In a bundle that has no files there is nothing to look at."""
        monkeypatch.setattr(Path, "read_text", Mock(side_effect=OSError))
        require_libpass()

    def test_when_the_library_is_imported(self, installed: Path) -> None:
        """A program stops where it imports the service, and not at the logins of some accounts."""
        (installed / "__init__.py").write_text("__version__ = '1.7.4'\n")
        program = (
            f"import sys; sys.path.insert(0, {str(installed.parent)!r}); import tortoise_auth; "
        )
        for line, works in (("", True), ("tortoise_auth.AuthService", False)):
            ended = subprocess.run(
                [sys.executable, "-c", program + line], capture_output=True, text=True, check=False
            )
            assert (ended.returncode == 0) is works
            assert (COMMAND in ended.stderr) is not works
