"""R40 to R49, R57, R60 and R70 to R77: what a session and its tokens allow, and for how long."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tortoise.context import TortoiseContext
from tortoise.exceptions import OperationalError
from tortoise.transactions import in_transaction

import tortoise_auth
from tests.support.accounts import (
    EMAIL,
    NEW_PASSWORD,
    PASSWORD,
    SECRET,
    assert_live,
    assert_over,
    log_in,
    signed,
)
from tests.support.app import StrUser, User, UuidUser
from tests.support.database import SHARED_DATABASES, address, connection_of, database
from tests.support.services import needs_mariadb
from tests.support.statements import statements
from tortoise_auth import AbstractUser, AuthConfig, AuthResult, AuthService, EventEmitter
from tortoise_auth.clock import utc_now
from tortoise_auth.exceptions import (
    ServiceUnavailableError,
    TokenInvalidError,
    TokenReusedError,
    TokenRevokedError,
)
from tortoise_auth.models import AttemptCount, Session
from tortoise_auth.sessions.refresh_tokens import RefreshToken
from tortoise_auth.testing import FakeClock, capture

PACKAGE = Path(tortoise_auth.__file__).parent
ROOT = PACKAGE.parent


class TestRandomness:
    def test_refresh_tokens_are_unique(self) -> None:
        """R40: a hundred thousand tokens agree neither in their secret part nor in their family."""
        tokens = [RefreshToken.new() for _ in range(100_000)]
        assert len({token.hash for token in tokens}) == len(tokens)
        assert len({token.family_hash for token in tokens}) == len(tokens)

    def test_source(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """R40: 128 and 256 bits come from the generator of the system, and no other generator is used."""
        drawn: list[int] = []
        original = os.urandom

        def draw(size: int) -> bytes:
            drawn.append(size)
            return original(size)

        monkeypatch.setattr("secrets.token_bytes", draw)
        RefreshToken.new()
        assert drawn == [16, 32]
        imported = {
            name.name
            for path in PACKAGE.rglob("*.py")
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in node.names
            if isinstance(node, ast.Import) or node.module == "random"
        }
        assert "secrets" in imported
        assert "random" not in imported

    async def test_public_id_opens_nothing(self, auth: AuthService[User], ada: User) -> None:
        """R40: the public id of a session is no token at any door."""
        result = await log_in(auth)
        for text in (str(result.session.id), result.session.id.hex):
            with pytest.raises(TokenInvalidError):
                await auth.authenticate(text)
            with pytest.raises(TokenInvalidError):
                await auth.refresh(text)
            with pytest.raises(TypeError, match="revoke_session"):
                await auth.logout(text)
        await assert_live(auth, result)


class TestReassignedKey:
    @pytest.mark.parametrize(
        ("model", "key"),
        [
            pytest.param(User, {"id": 7}, id="int"),
            pytest.param(UuidUser, {"id": uuid.UUID(int=7)}, id="uuid"),
            pytest.param(StrUser, {"code": "ada"}, id="str"),
        ],
    )
    async def test_successor_is_another_account(
        self, db: TortoiseContext, model: type[AbstractUser], key: dict[str, object]
    ) -> None:
        """R57: tokens of a deleted account do not open the next one with the same primary key."""
        auth = AuthService(model, AuthConfig(secret=SECRET), clock=FakeClock(utc_now()))
        predecessor = await model.create_user(email=EMAIL, password=PASSWORD, **key)
        result = await auth.login(EMAIL, PASSWORD)
        await predecessor.delete()
        successor = await model.create_user(email=EMAIL, password=PASSWORD, **key)
        await assert_over(auth, result)
        own = await auth.login(EMAIL, PASSWORD)
        assert [each.id for each in await auth.sessions(successor)] == [own.session.id]
        await assert_live(auth, own)

    async def test_neighbours_are_left_alone(
        self, auth: AuthService[User], ada: User, clock: FakeClock
    ) -> None:
        """R57: a sign-up with a key of its own ends no session of another account."""
        clock.now = utc_now()
        result = await log_in(auth)
        await User.create_user(email="bob@example.com", password=PASSWORD, id=ada.pk + 1)
        await assert_live(auth, result)

    async def test_generated_keys_are_not_reassigned(self, db: TortoiseContext) -> None:
        """R57: the key of a deleted account is not handed out again."""
        first = await User.create_user(email=EMAIL, password=PASSWORD)
        await first.delete()
        second = await User.create_user(email=EMAIL, password=PASSWORD)
        assert second.pk > first.pk


class TestRevocation:
    async def test_no_spelling_of_a_token_escapes(self, auth: AuthService[User], ada: User) -> None:
        """R60: after a logout no other spelling of the tokens works, nor any later one of the session."""
        first = await log_in(auth)
        second = await auth.refresh(first.refresh_token)
        await auth.logout(first.access_token)
        for result in (first, second):
            for tail in ("", "=", "==", " ", "\n"):
                with pytest.raises((TokenInvalidError, TokenRevokedError)):
                    await auth.authenticate(result.access_token + tail)
                with pytest.raises((TokenInvalidError, TokenReusedError, TokenRevokedError)):
                    await auth.refresh(result.refresh_token + tail)

    async def test_gone_is_gone(self, auth: AuthService[User], ada: User, clock: FakeClock) -> None:
        """A185: ended, purged and unknown sessions, and those of a deleted user, are refused alike."""
        ended, purged, orphaned = [await log_in(auth) for _ in range(3)]
        await auth.logout(ended.refresh_token)
        await Session.filter(id=purged.session.id).delete()
        await Session.filter(id=orphaned.session.id).update(user_id="999")
        never = signed(auth, clock, str(ada.pk), str(uuid.uuid4()))
        unknown = signed(auth, clock, "999", str(orphaned.session.id))
        tokens = [each.access_token for each in (ended, purged, orphaned)] + [never, unknown]
        answers = set()
        for token in tokens:
            with pytest.raises(TokenRevokedError) as refusal:
                await auth.authenticate(token)
            error = refusal.value
            answers.add((type(error), error.args, error.code, error.__cause__, error.__context__))
        assert len(answers) == 1

    async def test_listed_and_ended_by_their_owner(
        self, auth: AuthService[User], ada: User
    ) -> None:
        """R45: listed sessions can be ended one by one and all at once, and are not listed afterwards."""
        kept, ended, other = [await log_in(auth) for _ in range(3)]
        listed = {session.id for session in await auth.sessions(ada)}
        assert listed == {each.session.id for each in (kept, ended, other)}
        await auth.revoke_session(ended.session.id, user=ada)
        await assert_over(auth, ended)
        await auth.logout_all(ada, keep=kept.session)
        assert [session.id for session in await auth.sessions(ada)] == [kept.session.id]

    async def test_any_number_at_once(self, auth: AuthService[User], ada: User) -> None:
        """R49: a user may have any number of separate sessions."""
        results = await asyncio.gather(*(log_in(auth) for _ in range(20)))
        assert len({result.session.id for result in results}) == 20
        assert len(await auth.sessions(ada)) == 20


class TestRights:
    async def test_are_looked_up(self, auth: AuthService[User], ada: User) -> None:
        """A99: the rights of an account come from its row at each request, not from the token."""
        result = await auth.login(EMAIL, PASSWORD, claims={"role": "admin"})
        await User.filter(pk=ada.pk).update(display_name="Demoted")
        assert (await auth.authenticate(result.access_token)).display_name == "Demoted"

    async def test_do_not_grow_at_a_refresh(self, auth: AuthService[User], ada: User) -> None:
        """R74, A99: claims of the host end with their access token; a refresh repeats none of them."""
        result = await auth.login(EMAIL, PASSWORD, claims={"role": "admin"})
        assert auth.decode(result.access_token).extra == {"role": "admin"}
        assert auth.decode((await auth.refresh(result.refresh_token)).access_token).extra == {}

    async def test_handler_that_changes_the_user(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """A137: changes of a handler to the live object are not saved, and change no token."""
        eve = await User.create_user(email="eve@example.com", password=PASSWORD)

        @emitter.on("user_login", "session_refreshed")
        async def meddle(user: User) -> None:
            user.pk, user.password, user.email = eve.pk, eve.password, "mallory@example.com"
            user.is_active, user.session_version = False, 99

        before = await User.filter(pk=ada.pk).values("id", "email", "password", "is_active")
        result = await auth.refresh((await log_in(auth)).refresh_token)
        assert await User.filter(pk=ada.pk).values("id", "email", "password", "is_active") == before
        assert auth.decode(result.access_token).subject == str(ada.pk)
        assert (await auth.authenticate(result.access_token)).pk == ada.pk


class Panic(BaseException):
    """A `BaseException` that does not end a program."""


class TestHandlerThatEndsTheProgram:
    async def test_leaves_no_orphan_session(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """A131: SystemExit propagates, and the session whose tokens the caller never received ends."""

        @emitter.on("user_login")
        async def leave(user: User) -> None:
            raise SystemExit

        with pytest.raises(SystemExit):
            await log_in(auth)
        await emitter.aclose(10)
        assert await auth.sessions(ada) == []
        assert await Session.filter(revoked_at=None).count() == 0

    async def test_anything_else_is_a_failure(
        self,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """A131: any other exception of a handler is logged, and the login stands."""

        @emitter.on("user_login")
        async def panic(user: User) -> None:
            raise Panic("over")

        result = await log_in(auth)
        assert (await auth.authenticate(result.access_token)).pk == ada.pk
        assert [record.message for record in caplog.records] == [
            "Handler 'panic' for event 'user_login' raised Panic: over"
        ]

    async def test_after_it_ended_everything(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """A131: a session that has ended by then is neither ended nor emitted again."""

        @emitter.on("user_login")
        async def end_and_crash(user: User) -> None:
            await auth.logout_all(user)
            raise SystemExit

        with capture(emitter) as events:
            with pytest.raises(SystemExit):
                await log_in(auth)
            await emitter.aclose(10)
        assert events.names == ["user_login", "user_logout"]


class TestLostReply:
    """The COMMIT of a refresh succeeds, and the connection breaks before the answer arrives."""

    @pytest.mark.parametrize("grace", [0, 30])
    async def test_of_a_refresh(
        self,
        db: TortoiseContext,
        ada: User,
        clock: FakeClock,
        grace: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A147: when the client retries, the grace keeps the session live; without it the session ends."""
        config = AuthConfig(secret=SECRET, refresh_reuse_grace=timedelta(seconds=grace))
        auth = AuthService(User, config, clock=clock)
        result = await log_in(auth)
        block: Any = connection_of(db)._in_transaction()
        wrapper = type(getattr(block, "client", None) or block.connection)
        commit = wrapper.commit

        async def commit_and_break(self: object) -> None:
            await commit(self)
            raise OperationalError("the connection was lost")

        with monkeypatch.context() as patch:
            patch.setattr(wrapper, "commit", commit_and_break)
            with pytest.raises(ServiceUnavailableError):
                await auth.refresh(result.refresh_token)
        if grace:
            await assert_live(auth, await auth.refresh(result.refresh_token))
        else:
            with pytest.raises(TokenReusedError):
                await auth.refresh(result.refresh_token)
            assert await auth.sessions(ada) == []


SECOND_NODE = """
import asyncio, json, os, sys
from tortoise.context import TortoiseContext
from tests.support.app import User
from tortoise_auth import AuthConfig, AuthService, TortoiseAuthError

async def answer(auth, order):
    method, argument = order
    try:
        result = await getattr(auth, method)(argument)
    except TortoiseAuthError as error:
        return error.code
    return "done"

async def main():
    orders = json.load(sys.stdin)
    config = {
        "connections": {"node": os.environ["NODE_URL"]},
        "apps": {"models": {"models": ["tests.support.app", "tortoise_auth.models"], "default_connection": "node"}},
    }
    async with TortoiseContext() as context:
        await context.init(config=config)
        auth = AuthService(User, AuthConfig(secret=os.environ["NODE_SECRET"]))
        json.dump([await answer(auth, order) for order in orders], sys.stdout)

asyncio.run(main())
"""


def on_a_second_node(url: str, *orders: tuple[str, str]) -> list[str]:
    """Carry out calls in a process that shares only database and secret with this one."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SECOND_NODE],
        input=json.dumps(orders),
        env={**os.environ, "PYTHONPATH": str(ROOT), "NODE_URL": url, "NODE_SECRET": SECRET},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answers: list[str] = json.loads(done.stdout)
    return answers


class Node:
    """This process: a service, its database, and the URL for other processes."""

    def __init__(self, auth: AuthService[User], url: str) -> None:
        self.auth = auth
        self.url = url


@pytest.fixture(params=SHARED_DATABASES)
async def node(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Node]:
    """A database that a second process can open: the file and PostgreSQL."""
    async with database(request.param, tmp_path) as context:
        await User.create_user(email=EMAIL, password=PASSWORD)
        yield Node(AuthService(User, AuthConfig(secret=SECRET)), address(context))


class TestTwoNodes:
    async def test_share_the_sessions(self, node: Node) -> None:
        """A76: a session that one process opened works in another, and ends in both at once."""
        result: AuthResult[User] = await log_in(node.auth)
        assert on_a_second_node(
            node.url, ("authenticate", result.access_token), ("logout", result.access_token)
        ) == ["done", "done"]
        await assert_over(node.auth, result)

    async def test_reuse_is_detected_in_another_process(self, node: Node) -> None:
        """A76, A100: a token that one process rotated is spent for a process that starts later."""
        first = await log_in(node.auth)
        second = await node.auth.refresh(first.refresh_token)
        assert on_a_second_node(
            node.url,
            ("authenticate", second.access_token),
            ("refresh", first.refresh_token),
            ("authenticate", second.access_token),
        ) == ["done", "token_reused", "token_revoked"]
        await assert_over(node.auth, second)


class TestTwoLoops:
    async def test_one_service(
        self, sqlite: TortoiseContext, auth: AuthService[User], tmp_path: Path
    ) -> None:
        """A149: one service works in two event loops, on two threads, each with its own database."""
        await User.create_user(email=EMAIL, password=PASSWORD)

        async def elsewhere() -> str:
            async with database("memory", tmp_path):
                await User.create_user(email=EMAIL, password=PASSWORD, display_name="Twin")
                result = await log_in(auth)
                return (await auth.authenticate(result.access_token)).display_name

        here, there = await asyncio.gather(
            log_in(auth), asyncio.to_thread(lambda: asyncio.run(elsewhere()))
        )
        assert there == "Twin"
        await assert_live(auth, here)


class TestRows:
    async def test_hot_paths_use_an_index(
        self, sqlite: TortoiseContext, auth: AuthService[User]
    ) -> None:
        """A104: no statement of a login, refresh, logout or purge reads a table from end to end."""
        ada = await User.create_user(email=EMAIL, password=PASSWORD)
        with statements(sqlite) as sent:
            result = await auth.refresh((await log_in(auth)).refresh_token)
            await auth.authenticate(result.access_token)
            await auth.logout(result.access_token)
            await auth.logout_all(ada)
            await auth.set_password(ada, NEW_PASSWORD)
            await auth.sessions(ada)
            await auth.purge_expired()
        connection = connection_of(sqlite)
        plans = {}
        for statement in {each for each in sent if " WHERE " in each}:
            values = [None] * statement.count("?")
            steps = await connection.execute_query_dict(f"EXPLAIN QUERY PLAN {statement}", values)
            plans[statement] = [step["detail"] for step in steps]
        assert len(plans) > 8
        scanned = {
            statement: plan
            for statement, plan in plans.items()
            if any(step.startswith("SCAN") for step in plan)
        }
        assert scanned == {}

    async def test_long_lists_use_an_index_on_postgres(
        self, postgres: TortoiseContext, auth: AuthService[User]
    ) -> None:
        """A104: PostgreSQL has an index for every list, logout and purge, whatever its statistics."""
        ada = await User.create_user(email=EMAIL, password=PASSWORD)
        first = (await log_in(auth)).session
        with statements(postgres) as sent:
            await auth.sessions(ada, before=first)
            await auth.logout_all(ada)
            await auth.purge_expired()
        plans = {}
        async with in_transaction(connection_of(postgres).connection_name) as connection:
            await connection.execute_script(
                "SET LOCAL enable_seqscan = off; SET LOCAL plan_cache_mode = force_generic_plan"
            )
            for number, statement in enumerate({each for each in sent if " WHERE " in each}):
                given = len(set(re.findall(r"\$\d+", statement)))
                values = f"({', '.join(['NULL'] * given)})" if given else ""
                await connection.execute_script(f"PREPARE plan{number} AS {statement}")
                steps = await connection.execute_query_dict(f"EXPLAIN EXECUTE plan{number}{values}")
                plans[statement] = " ".join(step["QUERY PLAN"] for step in steps)
        assert len(plans) >= 5
        assert {each for each, plan in plans.items() if "Seq Scan" in plan} == set()

    @needs_mariadb
    async def test_long_lists_use_an_index_on_mariadb(
        self, auth: AuthService[User], tmp_path: Path
    ) -> None:
        """A104: MariaDB reads as many rows for a list, a logout and a purge as it finds, of thousands."""
        async with database("mariadb", tmp_path, maxsize=1) as context:
            ada = await User.create_user(email=EMAIL, password=PASSWORD)
            first = (await log_in(auth)).session
            copies = [first.clone(pk=uuid.uuid4()) for _ in range(2000)]
            for number, each in enumerate(copies):
                each.user_id, each.family_hash = str(number + 100), f"f{number}"
            await Session.bulk_create(copies)
            at = round(auth._core.clock().timestamp() * 1_000_000)
            times = {"counted_at": at, "previous_at": at, "reserved_at": at}
            await AttemptCount.bulk_create(AttemptCount(key=str(n), **times) for n in range(2000))
            connection = connection_of(context)
            await connection.execute_script(
                "ANALYZE TABLE tortoise_auth_session, tortoise_auth_attempts"
            )
            await connection.execute_script("FLUSH STATUS")
            await auth.sessions(ada, before=first)
            await auth.logout_all(ada)
            await auth.purge_expired()
            counts = await connection.execute_query_dict("SHOW SESSION STATUS LIKE 'Handler_read%'")
            assert sum(int(each["Value"]) for each in counts) < 50


class TestPersonalData:
    async def test_generated_schemas_leave_the_hash_out(self, sqlite: TortoiseContext) -> None:
        """A184: Tortoise's own pydantic models show neither the hash nor the revocation anchor."""
        creator = pytest.importorskip("tortoise.contrib.pydantic").pydantic_model_creator
        ada = await User.create_user(email=EMAIL, password=PASSWORD)
        for model in (User, StrUser):
            schema = creator(model, name=f"Shown{model.__name__}")
            assert "email" in schema.model_fields
            assert not {"password", "session_version"} & schema.model_fields.keys()
        shown = creator(User, name="ShownAda").model_validate(ada).model_dump_json()
        assert ada.password not in shown
        assert EMAIL in shown


class TestEventsOfASession:
    async def test_reuse_emits_one_event(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """R71, R91, A81, A82: the first replay emits one event; a second and unknown tokens emit none."""
        other = await log_in(auth)
        first = await log_in(auth)
        second = await auth.refresh(first.refresh_token)
        with capture(emitter) as events:
            for _ in range(2):
                with pytest.raises(TokenReusedError):
                    await auth.refresh(first.refresh_token)
            with pytest.raises(TokenInvalidError):
                await auth.refresh(RefreshToken.new().text)
        assert events.names == ["refresh_token_reused"]
        await assert_over(auth, second)
        await assert_live(auth, other)
