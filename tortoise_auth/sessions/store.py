"""Sessions: open, find, rotate, revoke, list, purge."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from typing import Generic
from uuid import UUID

from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.expressions import Q
from tortoise.queryset import QuerySet

from tortoise_auth.clock import Clock
from tortoise_auth.config import AuthConfig
from tortoise_auth.context import RequestContext
from tortoise_auth.database import BATCH_SIZE, batches
from tortoise_auth.events.unit_of_work import UnitOfWork
from tortoise_auth.exceptions import TokenRevokedError
from tortoise_auth.models import Session, primary_key, user_table
from tortoise_auth.sessions.lookup import SessionReader, SessionWithUser
from tortoise_auth.sessions.refresh_tokens import RefreshToken
from tortoise_auth.throttling import source_of
from tortoise_auth.users.changes import shared_connection
from tortoise_auth.users.model import UserT


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
        self._reader = SessionReader(user_model)
        # Of every key: the newest token may have been derived under the one that was first before.
        self._chain_keys = [key.derive("refresh chain") for key in config.keys]
        self._network_keys = [key.derive("network of a session") for key in config.keys]

    def connection(self) -> BaseDBAsyncClient:
        """Return the connection of sessions and users; see `shared_connection`."""
        return shared_connection(self._user_model)

    async def open(
        self,
        user: UserT,
        context: RequestContext,
        connection: BaseDBAsyncClient,
        *,
        authenticated_at: datetime,
        methods: Sequence[str],
        lifetime: timedelta | None = None,
    ) -> tuple[Session, RefreshToken]:
        """Insert a new session and return it with its first refresh token.

        A *lifetime* that is longer than that of the configuration changes nothing.

        Warning: the caller vouches for the user. Only the gate does so, `flows.signin`.
        """
        now = self._clock()
        token = RefreshToken.new()
        longest = self._config.session_lifetime
        ends = now + (longest if lifetime is None else min(lifetime, longest))
        session = await Session.create(
            user_table=user_table(self._user_model),
            user_id=str(user.pk),
            # As it was read before the proof was checked: `store_login` has compared it and holds
            # the row.
            session_version=user.session_version,
            family_hash=token.family_hash,
            refresh_hash=token.hash,
            created_at=now,
            last_used_at=now,
            authenticated_at=authenticated_at,
            authentication_methods=" ".join(methods),
            refresh_expires_at=min(now + self._config.refresh_token_lifetime, ends),
            expires_at=ends,
            ip=context.ip,
            user_agent=context.user_agent,
            network_hash=self._network_hash(context.ip),
            using_db=connection,
        )
        return session, token

    async def find(self, session_id: str, user_id: str) -> SessionWithUser[UserT] | None:
        """Return a session with its user, in one statement."""
        sid, pk = _uuid(session_id), primary_key(self._user_model, user_id)
        if sid is None or pk is None:
            return None
        return await self._reader.read(self.connection(), sid, user_id, pk)

    async def find_by_refresh_token(self, token: RefreshToken) -> SessionWithUser[UserT] | None:
        """Return the session that *token* belongs or belonged to, with its user.

        Raises:
            TokenRevokedError: There is such a session, but its user is gone.
        """
        session = await self._one(family_hash=token.family_hash)
        if session is None:
            return None
        pair = await self._with_user(session)
        if pair is None:
            raise TokenRevokedError
        return pair

    async def find_by_id(self, session_id: object) -> SessionWithUser[UserT] | None:
        """Return a session by its public id, with its user."""
        sid = _uuid(session_id)
        session = None if sid is None else await self._one(id=sid)
        return None if session is None else await self._with_user(session)

    async def rotate(
        self, session: Session, spent: RefreshToken, context: RequestContext, unit: UnitOfWork
    ) -> RefreshToken | None:
        """Spend a refresh token for the next one; ``None`` if another caller was first."""
        now, following = self._clock(), spent.next(self._chain_keys[0])
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
            "network_hash": self._network_hash(context.ip) or session.network_hash,
        }
        # Compare and swap: of any number of callers with one token the database lets one match.
        spendable = Session.filter(
            id=session.id,
            refresh_hash=session.refresh_hash,
            revoked_at__isnull=True,
            expires_at__gt=now,
        )
        if not await spendable.using_db(unit.connection).update(**changes):
            return None
        session.update_from_dict(changes)  # read for this rotation, and dropped if it fails
        return following

    def is_unspent(self, session: Session, token: RefreshToken) -> bool:
        """Return whether *token* is the newest one of the session."""
        return secrets.compare_digest(token.hash, session.refresh_hash)

    def is_repeated(self, session: Session, token: RefreshToken) -> bool:
        """Return whether *token* belongs to the last rotation, within its grace period.

        It does if it was spent then or came into being then. Both are answered with the latter.
        """
        grace_ends = session.last_used_at + self._config.refresh_reuse_grace
        # Before the first rotation `last_used_at` is the login: the first token would be its own
        # successor.
        if not session.generation or self._clock() >= grace_ends:
            return False
        spent = secrets.compare_digest(token.hash, session.previous_refresh_hash or "")
        return spent or self.is_unspent(session, token)

    def newest(self, session: Session, token: RefreshToken) -> RefreshToken | None:
        """Return the unspent token of a session: *token*, or the one derived from it.

        Returns:
            ``None`` if the key that derived it is configured no more.
        """
        line = [token, *(token.next(key) for key in self._chain_keys)]
        return next((each for each in line if self.is_unspent(session, each)), None)

    async def revoke(self, session: Session, connection: BaseDBAsyncClient) -> bool:
        """End one session; false if it had ended before."""
        live = Session.filter(id=session.id, revoked_at__isnull=True)
        return bool(await live.using_db(connection).update(revoked_at=self._clock()))

    async def evict(self, user: UserT, connection: BaseDBAsyncClient) -> AsyncIterator[Session]:
        """Make room for one more session of *user*; yield those that ended for it.

        The caller holds the row of the user, so that of two logins one sees the session of the other.
        Warning: call it before the new session is inserted. A logout everywhere that runs meanwhile
        holds old sessions and waits for the new one, where InnoDB locks what it reads.
        """
        if self._config.max_sessions is None:
            return
        live = self._live(user).filter(session_version=user.session_version).using_db(connection)
        newest_first = live.order_by("-last_used_at", "-id")
        for session in await newest_first.offset(self._config.max_sessions - 1):
            if await self.revoke(session, connection):
                yield session

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

    async def carry_over(
        self, keep: UUID, user: UserT, version: int, connection: BaseDBAsyncClient
    ) -> None:
        """Let a live session of *user* go on under the new ``session_version``."""
        await (
            Session.filter(
                id=keep,
                user_id=str(user.pk),
                user_table=user_table(self._user_model),
                revoked_at__isnull=True,
                # Alive until this very change: a session that an earlier one has ended does not
                # come back.
                session_version=version - 1,
            )
            .using_db(connection)
            .update(session_version=version)
        )

    async def list(self, user: UserT, *, limit: int, before: Session | None) -> list[Session]:
        """Return live sessions of *user*, the one used last first; only those after *before*."""
        connection = self.connection()
        # Of the row, not of the object, which may be older; none if the account is closed.
        versions = await (
            self._user_model.filter(pk=user.pk, is_active=True)
            .using_db(connection)
            .values_list("session_version", flat=True)
        )
        after = Q()
        if before is not None:
            # By place and not by OFFSET, which skips a session when one before it ends.
            after = Q(last_used_at__lt=before.last_used_at) | Q(
                last_used_at=before.last_used_at, id__lt=before.id
            )
        return await (
            self._live(user)
            .filter(after, session_version__in=versions)
            .using_db(connection)
            .order_by("-last_used_at", "-id")
            .limit(limit)
        )

    def _live(self, user: UserT) -> QuerySet[Session]:
        """Return the sessions of *user* that have not ended by themselves, whatever their version."""
        now = self._clock()
        return Session.filter(
            user_id=str(user.pk),
            user_table=user_table(self._user_model),
            revoked_at__isnull=True,
            refresh_expires_at__gt=now,
            expires_at__gt=now,
        )

    async def were_opened_from(self, user_id: str, ip: str | None) -> bool:
        """Return whether a user has a session from the network of *ip*, as far as rows are kept."""
        # Under every key: a row keeps the hash of the key that was the first one when it was
        # written.
        hashes = [_hash_of_network(ip, key) for key in self._network_keys]
        matching = Session.filter(
            user_id=user_id, user_table=user_table(self._user_model), network_hash__in=hashes
        )
        return await matching.using_db(self.connection()).exists()

    async def purge(self) -> int:
        """Delete sessions whose absolute lifetime is over, of any user model; return how many.

        Not earlier: until then a spent token of theirs must be recognised as one.
        """
        connection, deleted = self.connection(), 0
        expired = Session.filter(expires_at__lte=self._clock()).using_db(connection)
        oldest = expired.order_by("expires_at").limit(BATCH_SIZE)
        async for _ in batches():  # pragma: no branch - it never ends by itself
            ids = await oldest.values_list("id", flat=True)
            if ids:
                deleted += await Session.filter(id__in=ids).using_db(connection).delete()
            if len(ids) < BATCH_SIZE:
                break
        return deleted

    def _network_hash(self, ip: str | None) -> str | None:
        return None if ip is None else _hash_of_network(ip, self._network_keys[0])

    async def _one(self, **which: object) -> Session | None:
        connection = self.connection()
        matching = Session.filter(user_table=user_table(self._user_model), **which)
        return await matching.using_db(connection).first()

    async def _with_user(self, session: Session) -> SessionWithUser[UserT] | None:
        pk = primary_key(self._user_model, session.user_id)
        user = await self._user_model.filter(pk=pk).using_db(self.connection()).first()
        return None if user is None else SessionWithUser(session, user)


def _hash_of_network(ip: str | None, key: bytes) -> str:
    return hmac.new(key, (source_of(ip) or "").encode(), hashlib.sha256).hexdigest()


def _uuid(value: object) -> UUID | None:
    if isinstance(value, UUID):
        return value
    try:
        parsed = UUID(value) if isinstance(value, str) else None
    except ValueError:
        return None
    # `UUID` also reads braces, URNs and capitals: an id has one spelling.
    return parsed if str(parsed) == value else None
