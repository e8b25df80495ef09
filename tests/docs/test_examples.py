"""Examples: each runs to its end, and the web application keeps its promises over HTTP."""

from __future__ import annotations

import importlib
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response

import tortoise_auth
from tests.support.accounts import PASSWORD, SECRET
from tests.support.services import needs_redis
from tortoise_auth.exceptions import (
    ConfigurationError,
    ServiceUnavailableError,
    ThrottledError,
    TortoiseAuthError,
)
from tortoise_auth.passwords import PasswordHasher
from tortoise_auth.testing import isolated

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEW_PASSWORD = "wrong donkey charger nail"
ADDRESS = "203.0.113.7"


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python on the package of this working tree, with warnings as errors and no secret."""
    inherited = {name: value for name, value in os.environ.items() if name != "AUTH_SECRET"}
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=cwd,
        env={**inherited, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
class TestScripts:
    @pytest.mark.parametrize(
        "script",
        [
            pytest.param(each, id=each.name, marks=[needs_redis] * (each.name == "broker.py"))
            for each in EXAMPLES
        ],
    )
    def test_runs(self, script: Path, tmp_path: Path) -> None:
        """The script runs to its end without a warning, prints something, and leaves no file behind."""
        finished = run(script, cwd=tmp_path)
        assert (finished.returncode, finished.stderr) == (0, "")
        assert len(finished.stdout.splitlines()) > 3
        assert list(tmp_path.iterdir()) == []

    def test_quickstart(self, tmp_path: Path) -> None:
        """Every step has its outcome, and every handler that is registered runs."""
        script = ROOT / "examples" / "quickstart.py"
        output = run(script, cwd=tmp_path).stdout
        for line in (
            "AuthenticationError: Invalid credentials",
            "2 sessions: a laptop and a phone",
            "it is Ada, in one SQL query",
            "TokenReusedError: The refresh token was used before",
            "1 session ended, and neither of its tokens works any more:",
        ):
            assert f"  {line}\n" in output
        assert output.count("TokenRevokedError: The session has ended") == 4
        source = script.read_text()
        handled = set(re.findall(r'received\("(\w+)"', source))
        assert len(handled) == source.count("\n@on(") >= 7
        assert set(re.findall(r"^  handler of (\w+): ", output, re.MULTILINE)) == handled


@dataclass(frozen=True)
class Site:
    """The web application, served in this process.

    Attributes:
        module: ``examples.fastapi_app``.
        client: A browser.
        database: Its SQLite file.
    """

    module: ModuleType
    client: TestClient
    database: Path

    def post(self, path: str, token: str = "", **fields: str) -> Response:
        """Send *fields* as JSON, with an access token if there is one."""
        return self.client.post(path, json=fields, headers=_bearer(token))

    def get(self, path: str, token: str = "") -> Response:
        """Ask, with an access token if there is one."""
        return self.client.get(path, headers=_bearer(token))

    def sign_up(self, password: str = PASSWORD, email: str = "ada@example.com") -> Response:
        """Sign up as Ada."""
        return self.post("/sign-up", email=email, password=password, display_name="Ada")

    def log_in(self, password: str = PASSWORD, email: str = "ada@example.com") -> Response:
        """Log in as Ada."""
        return self.post("/log-in", email=email, password=password)

    def mail(self) -> list[str]:
        """Return the text of all mail, once mail in flight has been sent."""
        assert self.client.portal is not None
        self.client.portal.call(tortoise_auth.emitter.aclose)
        return [text for _, text in self.module.outgoing_mail]

    def audit(self) -> list[tuple[str, str | None, str | None, str | None]]:
        """Return event, user, address and reason of each entry, in order."""
        connection = sqlite3.connect(self.database)
        try:
            rows = "SELECT event, user_id, ip, reason FROM auditentry ORDER BY id"
            return connection.execute(rows).fetchall()
        finally:
            connection.close()


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, hasher: PasswordHasher) -> Iterator[ModuleType]:
    """The application, freshly imported, with the emitter it has in real life and cheap hashes."""
    monkeypatch.setenv("AUTH_SECRET", SECRET)
    monkeypatch.setattr(tortoise_auth.AbstractUser, "emitter", tortoise_auth.emitter)
    with isolated(tortoise_auth.emitter):
        yield importlib.import_module("examples.fastapi_app")
        del sys.modules["examples.fastapi_app"]


@pytest.fixture
def site(module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Site]:
    database = tmp_path / "site.sqlite3"
    monkeypatch.setenv("DATABASE_URL", f"sqlite://{database}")
    with TestClient(module.app, client=(ADDRESS, 50000)) as client:
        yield Site(module, client, database)


class TestSignUp:
    def test_does_not_reveal_accounts(self, site: Site) -> None:
        """A second sign-up gets the very same answer and changes nothing; only the mail differs."""
        first, second = site.sign_up(), site.sign_up(NEW_PASSWORD, " Ada@EXAMPLE.com")
        assert (first.status_code, first.json()) == (202, "We have sent you an e-mail.")
        assert (second.status_code, second.content) == (first.status_code, first.content)
        assert second.headers == first.headers
        assert site.log_in().status_code == 200
        assert site.log_in(NEW_PASSWORD).status_code == 401
        assert site.mail() == [
            "Welcome, Ada!",
            "You have an account already. Forgot your password?",
        ]

    def test_refused_password(self, site: Site) -> None:
        """The answer names the rules that a password breaks, and no account is created."""
        answer = site.sign_up("password")
        assert answer.status_code == 422
        assert answer.json()["code"] == "password_refused"
        assert answer.json()["failures"] == ["too_short", "common"]
        assert site.log_in("password").status_code == 401

    def test_form_is_not_repeated(self, site: Site) -> None:
        """A form that lacks a field is refused without the password that was in it."""
        answer = site.post("/sign-up", password=PASSWORD)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
        assert answer.json()["detail"] == "email: Field required"

    def test_no_address(self, site: Site) -> None:
        """A value that is no e-mail address is refused."""
        answer = site.sign_up(email="ada")
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_identifier")

    @pytest.mark.parametrize("name", ["x" * 101, "canary\0", "canary\ud800"], ids=range(3))
    def test_name_that_no_column_can_hold(self, site: Site, name: str) -> None:
        """Such a name is an error of the client, not of the server, and no account is created."""
        body = {"email": "ada@example.com", "password": PASSWORD, "display_name": name}
        answer = site.client.post(
            "/sign-up", content=json.dumps(body), headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 422
        assert "display_name" in answer.text
        assert "canary" not in answer.text
        assert site.log_in().status_code == 401
        assert site.sign_up().status_code == 202


class TestLogIn:
    def test_bad_credentials(self, site: Site) -> None:
        """A wrong password and an unknown address get the same answer."""
        site.sign_up()
        wrong, unknown = site.log_in(NEW_PASSWORD), site.log_in(email="eve@example.com")
        assert wrong.status_code == unknown.status_code == 401
        assert wrong.json() == unknown.json()
        assert wrong.json()["code"] == "invalid_credentials"
        assert wrong.headers["WWW-Authenticate"] == "Bearer"

    def test_opens_a_session(self, site: Site) -> None:
        """The tokens are not cached, and the access token identifies the user."""
        site.sign_up()
        answer = site.log_in()
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.json()["token_type"] == "bearer"
        me = site.get("/me", answer.json()["access_token"])
        assert me.json() == {"email": "ada@example.com", "display_name": "Ada"}

    @pytest.mark.parametrize("token", ["", "garbage"])
    def test_without_a_token(self, site: Site, token: str) -> None:
        """A request without a valid token is asked for one."""
        answer = site.get("/me", token)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"


class TestSession:
    @pytest.fixture
    def ada(self, site: Site) -> dict[str, str]:
        """The tokens of a first session."""
        site.sign_up()
        tokens: dict[str, str] = site.log_in().json()
        return tokens

    def test_refresh(self, site: Site, ada: dict[str, str]) -> None:
        """A refresh returns new tokens that work, and are not cached."""
        answer = site.post("/refresh", refresh_token=ada["refresh_token"])
        assert answer.status_code == 200
        assert answer.headers["Cache-Control"] == "no-store"
        assert not set(answer.json().values()) & {ada["access_token"], ada["refresh_token"]}
        assert site.get("/me", answer.json()["access_token"]).status_code == 200

    def test_replayed_refresh(self, site: Site, ada: dict[str, str]) -> None:
        """A spent refresh token ends its session, and no other."""
        other = site.log_in().json()
        new = site.post("/refresh", refresh_token=ada["refresh_token"]).json()
        replay = site.post("/refresh", refresh_token=ada["refresh_token"])
        assert (replay.status_code, replay.json()["code"]) == (401, "token_reused")
        assert site.get("/me", new["access_token"]).json()["code"] == "token_revoked"
        assert site.get("/me", other["access_token"]).status_code == 200

    def test_list(self, site: Site, ada: dict[str, str]) -> None:
        """Every live session is listed, with its address."""
        site.log_in()
        listed = site.get("/sessions", ada["access_token"]).json()
        assert [each["ip"] for each in listed] == [ADDRESS, ADDRESS]
        assert len({each["id"] for each in listed}) == 2

    def test_change_password(self, site: Site, ada: dict[str, str]) -> None:
        """The session that changed the password stays live, the others end, and the owner gets a mail."""
        other, token = site.log_in().json(), ada["access_token"]
        assert site.post("/password", token, current=PASSWORD, new=NEW_PASSWORD).status_code == 200
        assert site.get("/me", token).status_code == 200
        assert site.post("/refresh", refresh_token=ada["refresh_token"]).status_code == 200
        assert site.get("/me", other["access_token"]).status_code == 401
        assert site.log_in().status_code == 401
        assert site.log_in(NEW_PASSWORD).status_code == 200
        assert site.mail()[1:] == ["Your password was changed. Was that you?"]

    def test_refused_change(self, site: Site, ada: dict[str, str]) -> None:
        """A wrong current password or a weak new one changes nothing."""
        token = ada["access_token"]
        assert site.post("/password", token, current="?", new=NEW_PASSWORD).status_code == 401
        assert site.post("/password", token, current=PASSWORD, new="short").status_code == 422
        assert site.log_in().status_code == 200

    def test_log_out(self, site: Site, ada: dict[str, str]) -> None:
        """A log-out ends this session at once; a second one ends nothing."""
        other = site.log_in().json()
        answers = [site.post("/log-out", ada["access_token"]).json() for _ in range(2)]
        assert answers == [1, 0]
        assert site.get("/me", ada["access_token"]).status_code == 401
        assert site.post("/refresh", refresh_token=ada["refresh_token"]).status_code == 401
        assert site.get("/me", other["access_token"]).status_code == 200

    def test_log_out_everywhere(self, site: Site, ada: dict[str, str]) -> None:
        """A log-out everywhere ends every session."""
        other = site.log_in().json()
        assert site.post("/log-out-everywhere", other["access_token"]).json() == 2
        for tokens in (ada, other):
            assert site.get("/me", tokens["access_token"]).status_code == 401
            assert site.post("/refresh", refresh_token=tokens["refresh_token"]).status_code == 401


class TestHooks:
    def test_audit(self, site: Site) -> None:
        """Every event is in the database, in order, with user, address and reason."""
        site.sign_up()
        site.log_in(NEW_PASSWORD)
        site.log_in(email=f"{PASSWORD}@example.com")
        first = site.log_in().json()
        site.post("/refresh", refresh_token=first["refresh_token"])
        site.post("/refresh", refresh_token=first["refresh_token"])
        token = site.log_in().json()["access_token"]
        site.post("/password", token, current=PASSWORD, new=NEW_PASSWORD)
        site.post("/log-out", token)
        happened = [entry for entry in site.audit() if entry[0] != "sign_up_answered"]
        assert happened == [
            ("user_registered", "1", ADDRESS, None),
            ("user_login_failed", "1", ADDRESS, "bad_password"),
            ("user_login_failed", None, ADDRESS, "not_found"),
            ("user_login", "1", ADDRESS, None),
            ("session_refreshed", "1", ADDRESS, None),
            ("refresh_token_reused", "1", ADDRESS, None),
            ("user_login", "1", ADDRESS, None),
            ("password_changed", "1", ADDRESS, None),
            ("user_logout", "1", ADDRESS, None),
        ]

    def test_shutdown_sends_waiting_mail(self, site: Site) -> None:
        """Mail that was in flight when the application stopped has been sent."""
        site.sign_up()
        site.client.__exit__()
        assert site.module.outgoing_mail == [("ada@example.com", "Welcome, Ada!")]


class TestFailures:
    @pytest.mark.parametrize(
        ("error", "status"), [(ServiceUnavailableError("down"), 503), (ThrottledError(30), 429)]
    )
    def test_status(
        self, site: Site, monkeypatch: pytest.MonkeyPatch, error: TortoiseAuthError, status: int
    ) -> None:
        """A failure that is not about the credentials is not answered with 401."""
        _fail(monkeypatch, site, error)
        answer = site.log_in()
        assert (answer.status_code, answer.json()["code"]) == (status, error.code)
        assert "WWW-Authenticate" not in answer.headers

    @pytest.mark.parametrize(("seconds", "header"), [(30, "30"), (30.2, "31"), (0.2, "1")])
    def test_retry_after(
        self, site: Site, monkeypatch: pytest.MonkeyPatch, seconds: float, header: str
    ) -> None:
        """A client that waits for the seconds of the header is not too early."""
        _fail(monkeypatch, site, ThrottledError(seconds))
        assert site.log_in().headers["Retry-After"] == header

    def test_mistake_of_ours(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        """A configuration error reaches the log of the server, not the client."""
        _fail(monkeypatch, site, ConfigurationError("a table is missing"))
        with pytest.raises(ConfigurationError, match="a table is missing"):
            site.log_in()

    def test_no_secret(self, tmp_path: Path) -> None:
        """Without a secret the application does not start, and its error says what to do."""
        finished = run("-c", "import examples.fastapi_app", cwd=tmp_path)
        assert finished.returncode == 1
        assert finished.stderr.startswith("Set AUTH_SECRET")
        assert len(finished.stderr.splitlines()) == 1


def _fail(monkeypatch: pytest.MonkeyPatch, site: Site, error: TortoiseAuthError) -> None:
    async def failing(*args: object) -> None:
        raise error

    monkeypatch.setattr(site.module.auth, "login", failing)
