"""A180: neither optimisation, locale, time zone nor hash seed changes what the library does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def turkish(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A Turkish locale, compiled where the system has only its source."""
    folder = tmp_path_factory.mktemp("locales")
    names = {"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"}
    localedef = shutil.which("localedef")
    if localedef is None:
        return names
    made = subprocess.run(
        [localedef, "-i", "tr_TR", "-f", "UTF-8", folder / "tr_TR.UTF-8"], capture_output=True
    )
    return names if made.returncode else {**names, "LOCPATH": str(folder)}


def live(*options: str, **environment: str) -> tuple[str, list[str]]:
    """Run the life of an account in a separate Python; return its settings, and the lines."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *options, "-m", "tests.security.life"],
        cwd=ROOT,
        env={
            **{"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"},
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    setting, *lines = done.stdout.splitlines()
    return setting, lines


@pytest.fixture(scope="module")
def usual() -> list[str]:
    """The lines of an ordinary Python."""
    _, lines = live()
    return lines


def test_life_is_complete(usual: list[str]) -> None:
    """A180: the life that is compared has successes, refusals of every kind, and events."""
    text = "\n".join(usual)
    assert len(usual) > 60
    for word in (
        *("ConfigurationError", "SubscriptionError", "AuthenticationError", "ThrottledError"),
        *("PasswordPolicyError", "IdentifierTakenError", "TokenInvalidError", "TokenReusedError"),
        *("TokenRevokedError", "ValueError", "user_login_failed", "refresh_token_reused", "later"),
    ):
        assert word in text
    assert "accepted" not in text


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        pytest.param(["-O"], {}, id="O"),
        pytest.param(["-OO"], {}, id="OO"),
        *(
            pytest.param([], {"PYTHONHASHSEED": seed}, id=f"hash-seed-{seed}")
            for seed in ("1", "2", "4242", "random")
        ),
        pytest.param([], {"TZ": "Asia/Kathmandu"}, id="east"),
        pytest.param([], {"TZ": "America/St_Johns"}, id="west"),
        pytest.param(["-X", "utf8=0"], {"LC_ALL": "POSIX"}, id="ASCII"),
        pytest.param(["-X", "dev"], {}, id="development-mode"),
    ],
)
def test_changes_nothing(
    usual: list[str], options: list[str], environment: Mapping[str, str]
) -> None:
    """A180: every result, error, text and event is the same, and no warning is given."""
    _, lines = live(*options, **environment)
    assert lines == usual


@pytest.mark.parametrize("options", [[], ["-O"]], ids=["plain", "O"])
def test_turkish_locale(usual: list[str], turkish: dict[str, str], options: list[str]) -> None:
    """A180: a locale with another small letter of I changes neither addresses nor passwords."""
    setting, lines = live(*options, **turkish)
    if not setting.startswith("tr_TR"):
        pytest.skip("this system has no Turkish locale and cannot make one")
    assert lines == usual


class TestFloors:
    """A187: vulnerable versions are neither installed nor allowed."""

    @pytest.mark.parametrize(("name", "unfit"), [("pyjwt", "2.14.0"), ("libpass", "1.7.4")])
    def test_unfit_versions_are_excluded(self, name: str, unfit: str) -> None:
        """A187: vulnerable versions do not meet the declared requirement; the installed one does."""
        project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        declared = {
            requirement.name: requirement
            for requirement in map(Requirement, project["dependencies"])
        }
        assert Version(unfit) not in declared[name].specifier
        assert Version(version(name)) in declared[name].specifier
