"""Checking a password: throttled, at the same cost whatever is wrong, and told of when refused."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tortoise_auth.clock import Clock
from tortoise_auth.context import RequestContext, storable
from tortoise_auth.database import is_transaction
from tortoise_auth.events.catalog import (
    AccountLocked,
    Event,
    FailureReason,
    LoginThrottled,
    UserLoginFailed,
)
from tortoise_auth.events.dispatch import EventEmitter
from tortoise_auth.events.unit_of_work import report
from tortoise_auth.exceptions import (
    AuthenticationError,
    InvalidIdentifierError,
    ServiceUnavailableError,
    ThrottledError,
    TortoiseAuthError,
)
from tortoise_auth.passwords import PasswordHasher, Verification
from tortoise_auth.sessions import Sessions
from tortoise_auth.throttling import Attempt, Reservation, Throttle, source_of
from tortoise_auth.users import UserT, user_table

ResultT = TypeVar("ResultT")

_MAX_IDENTIFIER_LENGTH = 320
_AT_A_TIME = 4
_STRANGERS = 1 << 18
"""Counters that all identifiers without an account share, so that guessers cannot fill the table."""
_PATIENCE = 5.0
"""Seconds to wait for a throttle: its store may hang, or its pool be empty for good because whoever
has a connection waits for a second one, in a transaction of the caller."""


@dataclass(frozen=True, slots=True)
class Verified(Generic[UserT]):
    """A password that was right.

    Attributes:
        user: Whose it is, as read before the check.
        replacement: A hash of today's cost, if the stored one is outdated.
    """

    user: UserT
    replacement: str | None = field(repr=False)


class Credentials(Generic[UserT]):
    """Checks passwords of one user model.

    Args:
        user_model: The host's user model.
        sessions: Its sessions, which know where a user has logged in from.
        passwords: What hashes.
        emitter: Where refusals are told.
        throttle: How often passwords may be tried; ``None`` for as often as anybody likes.
        secret: Hides identifiers from who reads the counters, and keeps guessers from choosing
            which of them share one.
        clock: The time.
    """

    def __init__(
        self,
        user_model: type[UserT],
        sessions: Sessions[UserT],
        passwords: PasswordHasher,
        emitter: EventEmitter,
        throttle: Throttle | None,
        secret: bytes,
        clock: Clock,
    ) -> None:
        self._user_model = user_model
        self._sessions = sessions
        self._passwords = passwords
        self._emitter = emitter
        self._throttle = throttle
        self._secret = secret
        self._clock = clock
        self._turns: dict[tuple[int, str], tuple[asyncio.Semaphore, int]] = {}

    async def check_login(
        self, identifier: str, password: str, context: RequestContext
    ) -> Verified[UserT]:
        """Check the password of whoever has this identifier.

        Raises:
            AuthenticationError: For whatever reason; it has been told.
            ThrottledError: It was not checked; that has been told, too.
        """
        user = await self._find_user(identifier)
        async with self._turn(identifier, user) as events:
            return await self._check_login(identifier, user, password, context, events)

    async def _check_login(
        self,
        identifier: str,
        user: UserT | None,
        password: str,
        context: RequestContext,
        events: list[Event],
    ) -> Verified[UserT]:
        reservation = await self._reserve(identifier, user, context, events)
        active = user if user is not None and user.is_active else None
        locked = reservation is not None and reservation.locked
        stored = active.password if active is not None and not locked else None
        verification, replacement = await self._verify(password, stored, reservation)
        if user is None or not verification.valid:
            reason: FailureReason = (
                "not_found"
                if user is None
                else "inactive"
                if active is None
                else "locked"
                if locked
                else "bad_password"
            )
            await self._failed(reservation, user, context, events)
            events.append(self._refusal(identifier, reason, user, context))
            raise AuthenticationError
        await self._succeeded(reservation)
        return Verified(user, replacement)

    async def check_current(self, user: UserT, password: str, context: RequestContext) -> str:
        """Check the password of somebody who is logged in; return the stored hash it matches.

        Raises:
            AuthenticationError: It is wrong, which has been told, or the account is inactive.
            ThrottledError: It was not checked; that has been told, too.
        """
        connection = self._sessions.connection()
        user_now = await self._user_model.filter(pk=user.pk).using_db(connection).first()
        identifier = str(getattr(user, user.identifier_field))
        async with self._turn(identifier, user_now) as events:
            return await self._check_current(identifier, user_now, password, context, events)

    async def _check_current(
        self,
        identifier: str,
        user_now: UserT | None,
        password: str,
        context: RequestContext,
        events: list[Event],
    ) -> str:
        reservation = await self._reserve(identifier, user_now, context, events)
        active = user_now if user_now is not None and user_now.is_active else None
        locked = reservation is not None and reservation.locked
        stored = active.password if active is not None and not locked else None
        verification, _ = await self._verify(password, stored, reservation, rehash=False)
        if stored is None or not verification.valid:
            await self._failed(reservation, user_now, context, events)
            if active is not None:  # neither closed nor gone: there is something to guess
                reason: FailureReason = "locked" if locked else "bad_password"
                events.append(self._refusal(identifier, reason, user_now, context))
            raise AuthenticationError
        await self._succeeded(reservation)
        return stored

    async def refusal(
        self, identifier: str, reason: FailureReason, user: UserT | None, context: RequestContext
    ) -> AuthenticationError:
        """Tell that a password was refused, and return the error to raise: always the same."""
        await self._tell(self._refusal(identifier, reason, user, context))
        return AuthenticationError()

    def _refusal(
        self, identifier: str, reason: FailureReason, user: UserT | None, context: RequestContext
    ) -> UserLoginFailed:
        return UserLoginFailed(
            identifier=_shown(identifier),
            reason=reason,
            user_id=_id(user),
            subject_id=_id(user),
            context=context,
            occurred_at=self._clock(),
        )

    @asynccontextmanager
    async def _turn(self, identifier: str, user: UserT | None) -> AsyncIterator[list[Event]]:
        """Let few attempts at one account be under way at a time; tell of a refusal when it is over.

        Whoever guesses and has slow handlers told of it must not make the user wait in a queue.
        """
        events: list[Event] = []
        try:
            async with self._place(identifier, user):
                yield events
        except (AuthenticationError, ThrottledError):
            for event in events:
                await self._tell(event)
            raise

    @asynccontextmanager
    async def _place(self, identifier: str, user: UserT | None) -> AsyncIterator[None]:
        """Wait while as many others as may are trying the same account.

        An attempt is counted before it is known to be right. Without this, one user who logs in
        many times at once, as a test or a script does, would be throttled by attempts that are all
        about to succeed. Not in a transaction of the caller: those who are trying may wait for the
        connection that it holds.
        """
        if self._throttle is None or is_transaction(self._sessions.connection()):
            yield
            return
        key = (id(asyncio.get_running_loop()), self._account(identifier, user))
        places, waiting = self._turns.get(key, (asyncio.Semaphore(_AT_A_TIME), 0))
        self._turns[key] = places, waiting + 1
        try:
            async with places:
                yield
        finally:
            places, waiting = self._turns.pop(key)
            if waiting > 1:
                self._turns[key] = places, waiting - 1

    async def _find_user(self, identifier: str) -> UserT | None:
        connection = self._sessions.connection()
        try:
            normal = self._user_model.normalize_identifier(identifier)
        except InvalidIdentifierError:
            return None
        matching = self._user_model.filter(**{self._user_model.identifier_field: normal})
        return await matching.using_db(connection).first()

    async def _verify(
        self,
        password: str,
        stored: str | None,
        reservation: Reservation | None,
        *,
        rehash: bool = True,
    ) -> tuple[Verification, str | None]:
        try:
            verification = await self._passwords.verify(password, stored)
            outdated = rehash and verification.outdated
            return verification, await self._passwords.hash(password) if outdated else None
        except Exception:
            # Our own fault, so it costs nobody an attempt. A cancellation does: who hangs up in
            # time would guess for free.
            if self._throttle is not None and reservation is not None:
                await self._settle(self._throttle.released(reservation))
            raise

    async def _reserve(
        self, identifier: str, user: UserT | None, context: RequestContext, events: list[Event]
    ) -> Reservation | None:
        if self._throttle is None:
            return None
        source = source_of(context.ip)

        async def familiar() -> bool:
            return await self._sessions.were_opened_from(_id(user) or "", source)

        attempt = Attempt(
            account=self._account(identifier, user),
            source=None if source is None else self._hidden(f"{self._table}:{source}"),
            familiar=familiar,
        )
        try:
            return await _available(self._throttle.reserve(attempt), _PATIENCE)
        except ThrottledError as throttled:
            events += (
                self._refusal(identifier, "throttled", user, context),
                LoginThrottled(
                    identifier=_shown(identifier),
                    retry_after=throttled.retry_after,
                    subject_id=_id(user),
                    context=context,
                    occurred_at=self._clock(),
                ),
            )
            raise

    async def _failed(
        self,
        reservation: Reservation | None,
        user: UserT | None,
        context: RequestContext,
        events: list[Event],
    ) -> None:
        if self._throttle is None or reservation is None:
            return
        await self._settle(self._throttle.failed(reservation))
        if reservation.locks and user is not None:
            events.append(
                AccountLocked(
                    user=user, subject_id=_id(user), context=context, occurred_at=self._clock()
                )
            )

    async def _succeeded(self, reservation: Reservation | None) -> None:
        if self._throttle is not None and reservation is not None:
            await self._settle(self._throttle.succeeded(reservation))

    async def _settle(self, counting: Coroutine[Any, Any, None]) -> None:
        """Tell the throttle how an attempt ended; after a transaction of the caller, if there is one.

        It would wait for a second connection there, or go with a rollback.
        """
        if is_transaction(self._sessions.connection()):
            self._emitter.detach(_available(counting), "count of a login")
        else:
            await _available(counting, _PATIENCE)

    def _account(self, identifier: str, user: UserT | None) -> str:
        """Return what stands for an account: its key and version, so that a new password starts anew."""
        if user is not None:
            return self._hidden(f"{self._table}:{user.pk}:{user.session_version}")
        try:
            typed = self._user_model.normalize_identifier(identifier)
        except InvalidIdentifierError:
            typed = _shown(identifier)
        number = int(self._hidden(f"{self._table}:{typed}"), 16) % _STRANGERS
        return f"stranger:{self._table}:{number}"

    @property
    def _table(self) -> str:
        return user_table(self._user_model)

    def _hidden(self, text: str) -> str:
        return hmac.new(self._secret, text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()

    async def _tell(self, event: Event) -> None:
        await report(event, self._sessions.connection(), self._emitter, clock=self._clock)


async def _available(
    answer: Coroutine[Any, Any, ResultT], patience: float | None = None
) -> ResultT:
    """Await a throttle; whatever is wrong with its store, the door stays shut."""
    try:
        async with asyncio.timeout(patience):
            return await answer
    except TortoiseAuthError:
        raise
    except Exception as error:  # noqa: BLE001 - any store, any client library
        kind = type(error).__name__
    raise ServiceUnavailableError(f"The throttle could not count this attempt ({kind})")


def _shown(identifier: object) -> str:
    """Return an identifier as events carry it: text, bounded, storable."""
    return storable(identifier if isinstance(identifier, str) else "", _MAX_IDENTIFIER_LENGTH)


def _id(user: UserT | None) -> str | None:
    return None if user is None else str(user.pk)
