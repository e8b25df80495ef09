"""What an import loads, what it defers to first use, and that the package does not show it."""

from __future__ import annotations

import ast
import json
import pickle
import pydoc
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tortoise_auth
from tortoise_auth import PasswordHasher, PasswordPolicy, SigningKey, events
from tortoise_auth.lazy import LazyModule

HEAVY = ["passlib", "argon2", "bcrypt", "zxcvbn", "jwt", "cryptography", "email_validator", "dns"]
"""Libraries that are loaded on first use."""

MEASURE = """
import json, sys, time
import tortoise
tortoises = time.process_time()
{statement}
ours = time.process_time() - tortoises
loaded = [name for name in {heavy} if name in sys.modules]
print(json.dumps([loaded, ours / tortoises]))
"""

ON_WHICH_THREAD = """
import asyncio, json, sys, threading
from importlib.abc import MetaPathFinder
from tortoise import Tortoise
from tests.support.app import User
from tortoise_auth import PasswordHasher

main, loaded_there = threading.get_ident(), []

class Noting(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in {heavy} and threading.get_ident() == main:
            loaded_there.append(name)

async def sign_up():
    await Tortoise.init(
        db_url="sqlite://:memory:", modules={{"models": ["tests.support.app", "tortoise_auth.models"]}}
    )
    await Tortoise.generate_schemas()
    user = await User.create_user(email="ada@example.com", password="correct horse battery staple")
    assert await user.check_password("correct horse battery staple")
    assert user.password_hasher.knows(user.password)
    await Tortoise.close_connections()

sys.meta_path.insert(0, Noting())
asyncio.run(sign_up())
print(json.dumps([loaded_there, [name for name in {heavy} if name in sys.modules]]))
"""

HOST = """
import sys

def test_nothing_is_loaded():
    assert "tortoise_auth.pytest_plugin" in sys.modules
    assert "tortoise" not in sys.modules
    assert [name for name in sys.modules if name.startswith("tortoise_auth.")] == [
        "tortoise_auth.lazy", "tortoise_auth.pytest_plugin"
    ]
"""


def run(script: str) -> Any:
    """Run *script* in a process of its own, and return the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class TestImport:
    @pytest.mark.parametrize(
        "statement",
        [
            "from tortoise_auth import *",
            "import tortoise_auth.events",
            "import tortoise_auth.models",
            "import tortoise_auth.passwords",
            "import tortoise_auth.testing",
        ],
    )
    def test_heavy_libraries(self, statement: str) -> None:
        """No import of the package loads a library that is needed later or never."""
        loaded, _ = run(MEASURE.format(statement=statement, heavy=HEAVY))
        assert loaded == []

    def test_time(self) -> None:
        """All of our names together take less CPU time than Tortoise does.

        The ratio is the same on a slow machine. It is about 0.8, of 110 modules, and was above 1.2
        when everything was loaded at once; the best of three runs does not depend on what else is running.
        """
        script = MEASURE.format(statement="from tortoise_auth import *", heavy=HEAVY)
        assert min(run(script)[1] for _ in range(3)) < 1

    def test_face_alone(self) -> None:
        """``import tortoise_auth`` loads no Tortoise before a name is used."""
        assert run(
            "import json, sys, tortoise_auth\n"
            "before = 'tortoise' in sys.modules\n"
            "tortoise_auth.AbstractUser\n"
            "print(json.dumps([before, 'tortoise' in sys.modules]))"
        ) == [False, True]

    def test_first_use_is_off_the_event_loop(self) -> None:
        """A first sign-up and check load hashers and word lists on other threads.

        The parser of e-mail addresses is small and loads where it is used.
        """
        hashers = [name for name in HEAVY if name not in {"jwt", "cryptography", "email_validator"}]
        there, anywhere = run(ON_WHICH_THREAD.format(heavy=hashers))
        assert there == []
        assert {"passlib", "argon2", "zxcvbn"} <= set(anywhere)

    def test_plugin(self, tmp_path: Path) -> None:
        """A run of pytest that uses none of our fixtures loads only the plugin."""
        (tmp_path / "test_host.py").write_text(HOST)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_host.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout


class TestFace:
    def test_names(self) -> None:
        """Every name of ``__all__`` is the object that its module defines."""
        homes = tortoise_auth._HOMES
        assert {*homes, "__version__"} == set(tortoise_auth.__all__)
        for name, home in homes.items():
            module = __import__(f"tortoise_auth.{home}", fromlist=[name])
            assert getattr(tortoise_auth, name) is getattr(module, name)
        assert tortoise_auth.emitter is events.emitter

    def test_type_checkers_see_the_same(self) -> None:
        """The names for type checkers are those that are imported on first use."""
        tree = ast.parse(Path(tortoise_auth.__file__).read_text())
        imported = {
            alias.name: str(node.module).removeprefix("tortoise_auth.")
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tortoise_auth.")
            for alias in node.names
        }
        assert imported == tortoise_auth._HOMES

    def test_modules(self) -> None:
        """The modules of the package are its attributes, without an import of their own."""
        script = "import json, tortoise_auth; print(json.dumps(tortoise_auth.throttling.__name__))"
        assert run(script) == "tortoise_auth.throttling"

    @pytest.mark.parametrize("name", ["AbstractUsr", "on_login", "__wrapped__", "_private", "nope"])
    def test_unknown(self, name: str) -> None:
        """An unknown name is an ``AttributeError`` that names it."""
        with pytest.raises(AttributeError, match=f"'tortoise_auth' has no attribute '{name}'"):
            getattr(tortoise_auth, name)

    def test_listed(self) -> None:
        """Completion and ``help`` show every name, used or not."""
        script = "import json, tortoise_auth; print(json.dumps(dir(tortoise_auth)))"
        assert set(tortoise_auth.__all__) <= set(run(script))
        text = pydoc.plain(pydoc.render_doc(tortoise_auth))
        assert all(name in text for name in ("class AbstractUser", "class AuthService", "emitter"))

    def test_star(self) -> None:
        """A star import imports every name."""
        namespace: dict[str, object] = {}
        exec("from tortoise_auth import *", namespace)
        assert set(tortoise_auth.__all__) <= namespace.keys()

    def test_pickled(self) -> None:
        """Classes and errors survive pickling."""
        for name in ("AbstractUser", "AuthService", "AuthenticationError", "RequestContext"):
            kind = getattr(tortoise_auth, name)
            assert pickle.loads(pickle.dumps(kind)) is kind


class TestHelp:
    @pytest.mark.parametrize("kind", [PasswordPolicy, PasswordHasher, SigningKey])
    def test_fits_a_screen(self, kind: type) -> None:
        """Signature and description are on the first screen, and no value is written out."""
        lines = pydoc.plain(pydoc.render_doc(kind)).splitlines()
        assert lines.index(" |  Methods defined here:") < 40
        assert len(lines) < 120
        assert max(map(len, lines)) < 200


class TestLazyModule:
    def test_loads_on_use(self) -> None:
        """The module is imported when one of its names is used, and not before."""
        script = (
            "import json, sys\n"
            "from tortoise_auth.lazy import LazyModule\n"
            "wave = LazyModule('wave')\n"
            "before = 'wave' in sys.modules\n"
            "opens = wave.open\n"
            "print(json.dumps([before, opens is sys.modules['wave'].open]))\n"
        )
        assert run(script) == [False, True]

    def test_names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A name is read at each use, so that it can be replaced in the module."""
        module = ModuleType("loaded_late")
        monkeypatch.setitem(sys.modules, "loaded_late", module)
        lazy: Any = LazyModule("loaded_late")
        module.size = 1  # type: ignore[attr-defined]
        assert lazy.size == 1
        module.size = 2  # type: ignore[attr-defined]
        assert lazy.size == 2
        with pytest.raises(AttributeError, match="no attribute 'weight'"):
            _ = lazy.weight

    def test_questions_load_nothing(self) -> None:
        """Reading special names, as tools do, does not load the module."""
        lazy = LazyModule("there.is.no.such.module")
        assert not hasattr(lazy, "__wrapped__")
        assert not hasattr(lazy, "_pytestfixturefunction")
        assert repr(lazy) == "<LazyModule: there.is.no.such.module>"
