"""Sessions: open, find, rotate, revoke, list, purge.

Rotation and revocation are single conditional UPDATEs, so that of any number of concurrent callers
exactly one succeeds, on every database.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Generic, NamedTuple
from uuid import UUID

from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.manager import Manager
from tortoise.models import Model

from tortoise_auth.clock import Clock
from tortoise_auth.config import AuthConfig
from tortoise_auth.context import RequestContext
from tortoise_auth.events.unit_of_work import UnitOfWork
from tortoise_auth.exceptions import TokenExpiredError, TokenRevokedError
from tortoise_auth.models import Session, primary_key, user_table
from tortoise_auth.throttling import source_of
from tortoise_auth.tokens import RefreshToken
from tortoise_auth.users.changes import shared_connection
from tortoise_auth.users.model import UserT

logger = logging.getLogger("tortoise_auth.sessions")

_PLACEHOLDERS = {"sqlite": "?", "postgres": "${}"}
_PURGE_BATCH = 1000


@dataclass(frozen=True, slots=True)
class Found(Generic[UserT]):
    """A session and its user, as they are in the database now."""

    session: Session
    user: UserT

    def require_alive(self, now: datetime) -> None:
        """Refuse a session that is over.

        Raises:
            TokenRevokedError: It was ended, its user is inactive, or the password has changed.
            TokenExpiredError: Its absolute lifetime is over.
        """
        if (
            self.session.revoked_at is not None
            or not self.user.is_active
            or self.session.session_version != self.user.session_version
        ):
            raise TokenRevokedError
        if self.session.expires_at <= now:
            raise TokenExpiredError

    def is_alive(self, now: datetime) -> bool:
        """Tell whether the session is not over."""
        try:
            self.require_alive(now)
        except (TokenRevokedError, TokenExpiredError):
            return False
        return self.session.refresh_expires_at > now  # or it has lain idle for too long


class Sessions(Generic[UserT]):
    """The sessions of one user model.

    Args:
        user_model: The host's user model.
        config: Lifetimes.
        clock: The time.
    """

    def __init__(self, user_model: type[UserT], config: AuthConfig, clock: Clock) -> None:
        self._user_model = user_model
        self._config = config
        self._clock = clock
        self._join = _SessionWithUser(user_model)

    def connection(self) -> BaseDBAsyncClient:
        """Return the connection of sessions and users; see `shared_connection`."""
        return shared_connection(self._user_model)

    async def open(
        self, user: UserT, context: RequestContext, connection: BaseDBAsyncClient
    ) -> tuple[Session, RefreshToken]:
        """Insert a new session and return it with its first refresh token."""
        now = self._clock()
        token = RefreshToken.new()
        ends = now + self._config.session_lifetime
        session = await Session.create(
            user_table=user_table(self._user_model),
            user_id=str(user.pk),
            session_version=user.session_version,
            family_hash=token.family_hash,
            refresh_hash=token.hash,
            created_at=now,
            last_used_at=now,
            refresh_expires_at=min(now + self._config.refresh_token_lifetime, ends),
            expires_at=ends,
            ip=context.ip,
            user_agent=context.user_agent,
            using_db=connection,
        )
        return session, token

    async def find(self, session_id: str, user_id: str) -> Found[UserT] | None:
        """Return a session with its user, in one statement."""
        sid, pk = _uuid(session_id), primary_key(self._user_model, user_id)
        if sid is None or pk is None:
            return None
        return await self._join.read(self.connection(), sid, user_id, pk)

    async def find_by_refresh_token(self, token: RefreshToken) -> Found[UserT] | None:
        """Return the session that *token* belongs or belonged to, with its user.

        Raises:
            TokenRevokedError: There is such a session, but its user is gone.
        """
        session = await self._one(family_hash=token.family_hash)
        if session is None:
            return None
        found = await self._with_user(session)
        if found is None:
            raise TokenRevokedError
        return found

    async def find_by_id(self, session_id: object) -> Found[UserT] | None:
        """Return a session by its public id, with its user."""
        sid = _uuid(session_id)
        session = None if sid is None else await self._one(id=sid)
        return None if session is None else await self._with_user(session)

    async def rotate(
        self, session: Session, spent: RefreshToken, context: RequestContext, unit: UnitOfWork
    ) -> RefreshToken | None:
        """Spend a refresh token for the next one; ``None`` if somebody else was first."""
        now, following = self._clock(), spent.next()
        changes = {
            "refresh_hash": following.hash,
            "previous_refresh_hash": session.refresh_hash,
            "generation": session.generation + 1,
            "last_used_at": now,
            "refresh_expires_at": min(
                now + self._config.refresh_token_lifetime, session.expires_at
            ),
            "ip": context.ip or session.ip,
            "user_agent": context.user_agent or session.user_agent,
        }
        spendable = Session.filter(
            id=session.id,
            refresh_hash=session.refresh_hash,
            revoked_at__isnull=True,
            expires_at__gt=now,
        )
        if not await spendable.using_db(unit.connection).update(**changes):
            return None
        unit.when_committed(lambda: session.update_from_dict(changes))
        return following

    def is_spendable(self, session: Session, token: RefreshToken) -> bool:
        """Tell whether *token* is the unspent one, or the one before within the grace period."""
        if secrets.compare_digest(token.hash, session.refresh_hash):
            return True
        grace_ends = session.last_used_at + self._config.refresh_reuse_grace
        is_previous = secrets.compare_digest(token.hash, session.previous_refresh_hash or "")
        return is_previous and self._clock() < grace_ends

    async def revoke(self, session: Session, connection: BaseDBAsyncClient) -> bool:
        """End one session; false if it had ended before."""
        live = Session.filter(id=session.id, revoked_at__isnull=True)
        return bool(await live.using_db(connection).update(revoked_at=self._clock()))

    async def revoke_all(
        self, user: UserT, connection: BaseDBAsyncClient, *, keep: UUID | None = None
    ) -> int:
        """End every live session of *user* but *keep*; return how many."""
        return await Session.end_all(
            user_table=user_table(self._user_model),
            user_id=str(user.pk),
            at=self._clock(),
            keep=keep,
            using_db=connection,
        )

    async def confirm(
        self, keep: UUID, user: UserT, version: int, connection: BaseDBAsyncClient
    ) -> None:
        """Let a live session of *user* go on under the new ``session_version``."""
        await (
            Session.filter(
                id=keep,
                user_id=str(user.pk),
                user_table=user_table(self._user_model),
                revoked_at__isnull=True,
                session_version=version - 1,
            )
            .using_db(connection)
            .update(session_version=version)
        )

    async def list(self, user: UserT) -> list[Session]:
        """Return the live sessions of *user*, the one used last first."""
        connection = self.connection()
        versions = await (
            self._user_model.filter(pk=user.pk, is_active=True)
            .using_db(connection)
            .values_list("session_version", flat=True)
        )
        now = self._clock()
        return await (
            Session.filter(
                user_id=str(user.pk),
                user_table=user_table(self._user_model),
                session_version__in=versions,
                revoked_at__isnull=True,
                refresh_expires_at__gt=now,
                expires_at__gt=now,
            )
            .using_db(connection)
            .order_by("-last_used_at")
        )

    async def were_opened_from(self, user_id: str, source: str | None) -> bool:
        """Tell whether a user has logged in from a source before, as far as we remember."""
        connection = self.connection()
        rows = await (
            Session.filter(user_id=user_id, user_table=user_table(self._user_model))
            .using_db(connection)
            .distinct()
            .values("ip")
        )
        return source is not None and source in {source_of(row["ip"]) for row in rows}

    async def purge(self) -> int:
        """Delete sessions whose absolute lifetime is over, in batches; return how many.

        Not earlier: until then a spent token of theirs must be recognised as one.
        """
        connection, deleted = self.connection(), 0
        while True:
            expired = (
                Session.filter(
                    expires_at__lte=self._clock(), user_table=user_table(self._user_model)
                )
                .using_db(connection)
                .limit(_PURGE_BATCH)
            )
            ids = await expired.values_list("id", flat=True)
            if not ids:
                return deleted
            deleted += await Session.filter(id__in=ids).using_db(connection).delete()

    async def _one(self, **which: object) -> Session | None:
        connection = self.connection()
        matching = Session.filter(user_table=user_table(self._user_model), **which)
        return await matching.using_db(connection).first()

    async def _with_user(self, session: Session) -> Found[UserT] | None:
        pk = primary_key(self._user_model, session.user_id)
        user = await self._user_model.filter(pk=pk).using_db(self.connection()).first()
        return None if user is None else Found(session, user)


class _Columns(NamedTuple):
    sql: str
    session: dict[str, str]
    user: dict[str, str]


class _SessionWithUser(Generic[UserT]):
    """Reads a session and its user in one statement, three times as fast as two ORM reads.

    Building SQL costs Tortoise more than running it, so the statement is built once and its rows
    are made into models by the hook that Tortoise's own querysets use. That hook is private: where
    it is missing or behaves otherwise, or where the host's model has a manager of its own that may
    hide rows, two ordinary reads do the same.
    """

    def __init__(self, user_model: type[UserT]) -> None:
        self._user_model = user_model
        self._may_join = True

    async def read(
        self, connection: BaseDBAsyncClient, session_id: UUID, user_id: str, pk: object
    ) -> Found[UserT] | None:
        dialect = connection.capabilities.dialect
        if self._may_join and dialect in _PLACEHOLDERS and self._has_plain_managers:
            try:
                return await self._read_joined(connection, session_id, user_id, pk)
            except (AttributeError, KeyError, TypeError):
                self._may_join = False
                logger.warning(
                    "This version of Tortoise ORM makes models in another way than we know; "
                    "authenticate() uses two queries instead of one from now on",
                    exc_info=True,
                )
        return await self._read_separately(connection, session_id, user_id, pk)

    async def _read_joined(
        self, connection: BaseDBAsyncClient, session_id: UUID, user_id: str, pk: object
    ) -> Found[UserT] | None:
        columns = self._columns[connection.capabilities.dialect]
        rows = await connection.execute_query_dict(
            columns.sql,
            [
                self._user_model._meta.pk.to_db_value(pk, self._user_model),
                str(session_id),
                user_id,
                user_table(self._user_model),
            ],
        )
        if not rows:
            return None
        return Found(
            _hydrated(Session, rows[0], columns.session),
            _hydrated(self._user_model, rows[0], columns.user),
        )

    async def _read_separately(
        self, connection: BaseDBAsyncClient, session_id: UUID, user_id: str, pk: object
    ) -> Found[UserT] | None:
        session = (
            await Session.filter(
                id=session_id, user_id=user_id, user_table=user_table(self._user_model)
            )
            .using_db(connection)
            .first()
        )
        user = await self._user_model.filter(pk=pk).using_db(connection).first()
        return None if session is None or user is None else Found(session, user)

    @cached_property
    def _has_plain_managers(self) -> bool:
        return all(type(model._meta.manager) is Manager for model in (Session, self._user_model))

    @cached_property
    def _columns(self) -> dict[str, _Columns]:
        return {dialect: self._build(mark) for dialect, mark in _PLACEHOLDERS.items()}

    def _build(self, mark: str) -> _Columns:
        session = {column: f"s_{column}" for column in Session._meta.fields_db_projection.values()}
        user = {
            column: f"u_{column}" for column in self._user_model._meta.fields_db_projection.values()
        }
        selected = [f's."{column}" AS "{alias}"' for column, alias in session.items()]
        selected += [f'u."{column}" AS "{alias}"' for column, alias in user.items()]
        marks = [mark.format(number) for number in range(1, 5)]
        sql = (
            f"SELECT {', '.join(selected)} "  # noqa: S608 - names of columns and tables, no values
            f"FROM {_table(Session)} s JOIN {_table(self._user_model)} u "
            f'ON u."{self._user_model._meta.db_pk_column}" = {marks[0]} '
            f"WHERE s.id = {marks[1]} AND s.user_id = {marks[2]} AND s.user_table = {marks[3]}"
        )
        return _Columns(sql, session, user)


def _table(model: type[Model]) -> str:
    schema = f'"{model._meta.schema}".' if model._meta.schema else ""
    return f'{schema}"{model._meta.db_table}"'


def _hydrated(model: type[Any], row: dict[str, Any], aliases: dict[str, str]) -> Any:  # noqa: ANN401
    instance = model._init_from_db(**{column: row[alias] for column, alias in aliases.items()})
    if instance._partial:
        raise TypeError(f"{model.__name__} was made with fields missing")
    return instance


def _uuid(value: object) -> UUID | None:
    if isinstance(value, UUID):
        return value
    try:
        parsed = UUID(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return parsed if str(parsed) == value else None
