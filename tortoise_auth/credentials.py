"""Checking a password: throttled, at the same cost whatever is wrong, and told of when refused."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from tortoise_auth.clock import Clock
from tortoise_auth.context import RequestContext, storable
from tortoise_auth.database import is_missing_table, is_transaction, translated
from tortoise_auth.events.catalog import (
    AccountLocked,
    Event,
    FailureReason,
    LoginThrottled,
    PasswordChangeFailed,
    UserLoginFailed,
)
from tortoise_auth.events.emitting import EventEmitter
from tortoise_auth.events.unit_of_work import report, report_detached
from tortoise_auth.exceptions import (
    AuthenticationError,
    InvalidIdentifierError,
    ServiceUnavailableError,
    ThrottledError,
    TortoiseAuthError,
)
from tortoise_auth.models import user_table
from tortoise_auth.passwords import PasswordHasher, Verification, is_usable_hash
from tortoise_auth.sessions import Sessions
from tortoise_auth.throttling import Attempt, Reservation, Throttle, source_of
from tortoise_auth.users import AbstractUser, UserT

logger = logging.getLogger("tortoise_auth.credentials")

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
        stored: The hash that it matches.
        replacement: A hash of today's cost, if the stored one is outdated.
    """

    user: UserT
    stored: str = field(repr=False)
    replacement: str | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Refused:
    """A password that was wrong, or not looked at: what to tell, and then to raise."""

    error: AuthenticationError | ThrottledError
    events: Sequence[Event]


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
        failed = partial(self.login_failed, identifier, user, context)
        return await self._check(identifier, user, password, context, failed)

    async def check_current(self, user: UserT, password: str, context: RequestContext) -> str:
        """Check the password of somebody who is logged in; return the stored hash it matches.

        Raises:
            AuthenticationError, ThrottledError: As `check_login` does.
        """
        connection = self._sessions.connection()
        user_now = await self._user_model.filter(pk=user.pk).using_db(connection).first()
        identifier = str(getattr(user, user.identifier_field))
        failed = partial(self.change_failed, user, context)
        verified = await self._check(identifier, user_now, password, context, failed, rehash=False)
        return verified.stored

    def login_failed(
        self,
        identifier: str,
        user: UserT | None,
        context: RequestContext,
        reason: FailureReason,
    ) -> UserLoginFailed:
        """Return the event of a refused login."""
        return UserLoginFailed(
            identifier=_shown(identifier),
            reason=reason,
            user_id=_id(user),
            subject_id=_id(user),
            context=context,
            occurred_at=self._clock(),
        )

    def change_failed(
        self, user: UserT, context: RequestContext, reason: FailureReason
    ) -> PasswordChangeFailed[UserT]:
        """Return the event of a refused password change."""
        return PasswordChangeFailed(
            user=user,
            reason=reason,
            subject_id=_id(user),
            context=context,
            occurred_at=self._clock(),
        )

    async def refuse(self, event: Event) -> AuthenticationError:
        """Tell that a password was refused, and return the error to raise: always the same."""
        await self._tell(event)
        return AuthenticationError()

    async def _check(
        self,
        identifier: str,
        user: UserT | None,
        password: str,
        context: RequestContext,
        failed: Callable[[FailureReason], Event],
        *,
        rehash: bool = True,
    ) -> Verified[UserT]:
        """Check a password in its turn, and tell of a refusal when the turn is over.

        Whoever guesses and has slow handlers told of it must not make the user wait in a queue.
        """
        async with self._turn(identifier, user):
            outcome = await self._attempt(
                identifier, user, password, context, failed, rehash=rehash
            )
        if isinstance(outcome, Verified):
            return outcome
        await self._tell(*outcome.events)
        raise outcome.error

    async def _attempt(
        self,
        identifier: str,
        user: UserT | None,
        password: str,
        context: RequestContext,
        failed: Callable[[FailureReason], Event],
        *,
        rehash: bool,
    ) -> Verified[UserT] | _Refused:
        try:
            reservation = await self._reserve(identifier, user, context)
        except ThrottledError as throttled:
            refusal = failed("throttled")
            told = LoginThrottled(
                identifier=_shown(identifier),
                retry_after=throttled.retry_after,
                attempted="login" if isinstance(refusal, UserLoginFailed) else "password_change",
                subject_id=_id(user),
                context=context,
                occurred_at=self._clock(),
            )
            return _Refused(throttled, [refusal, told])
        active = user if user is not None and user.is_active else None
        locked = reservation is not None and reservation.locked
        stored = active.password if active is not None and not locked else None
        events: list[Event] = []
        if user is not None and reservation is not None and reservation.locks:
            events.append(
                AccountLocked(
                    user=user, subject_id=_id(user), context=context, occurred_at=self._clock()
                )
            )
        try:
            verification, replacement = await self._verify(
                password, stored, reservation, rehash=rehash
            )
        except asyncio.CancelledError:  # the attempt counts all the same, and so it locks
            self._tell_later(*events)
            raise
        if active is not None and stored is not None and verification.valid:
            await self._succeeded(reservation)
            return Verified(active, stored, replacement)
        if stored is not None and is_usable_hash(stored) and not self._passwords.knows(stored):
            logger.warning(
                "%r has something for a password that is no hash, or none that can be checked "
                "here: is it from `create` instead of `create_user`, or of bcrypt without the "
                "extra bcrypt? `set_password` mends it",
                user,
            )
        events.append(failed(_reason(user, locked=locked)))
        try:
            await self._failed(reservation)
        except asyncio.CancelledError:
            self._tell_later(*events)
            raise
        return _Refused(AuthenticationError(), events)

    @asynccontextmanager
    async def _turn(self, identifier: str, user: UserT | None) -> AsyncIterator[None]:
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

    async def _tell(self, *events: Event) -> None:
        connection = self._sessions.connection()
        await report(*events, connection=connection, emitter=self._emitter, clock=self._clock)

    def _tell_later(self, *events: Event) -> None:
        connection = self._sessions.connection()
        report_detached(*events, connection=connection, emitter=self._emitter, clock=self._clock)

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
        rehash: bool,
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
        self, identifier: str, user: UserT | None, context: RequestContext
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
        return await _available(self._throttle.reserve(attempt), _PATIENCE)

    async def _failed(self, reservation: Reservation | None) -> None:
        if self._throttle is not None and reservation is not None:
            await self._settle(self._throttle.failed(reservation))

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
        """Return what stands for an account: its key and hash, so that a new password starts anew."""
        if user is not None:
            return self._hidden(f"{self._table}:{user.pk}:{user.password}")
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
        failure: Exception = ServiceUnavailableError(
            f"The throttle could not count this attempt ({type(error).__name__})"
        )
        if is_missing_table(error):
            failure = translated(error, "login")
    raise failure


def _shown(identifier: object) -> str:
    """Return an identifier as events carry it: text, bounded, storable."""
    return storable(identifier if isinstance(identifier, str) else "", _MAX_IDENTIFIER_LENGTH)


def _id(user: UserT | None) -> str | None:
    return None if user is None or user.pk is None else str(user.pk)


def _reason(user: AbstractUser | None, *, locked: bool) -> FailureReason:
    if user is None:
        return "not_found"
    if not user.is_active:
        return "inactive"
    return "locked" if locked else "bad_password"
