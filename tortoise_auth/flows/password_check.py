"""Checking a password: throttled, at the same cost whatever is wrong, and told of when refused."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from tortoise_auth.context import RequestContext, sanitize_text
from tortoise_auth.database import is_missing_table, is_transaction, translated, wait_uncancelled
from tortoise_auth.events.catalog import (
    AccountLocked,
    Event,
    FailureReason,
    LoginThrottled,
    PasswordChangeFailed,
    UserLoginFailed,
)
from tortoise_auth.events.unit_of_work import emit_failure
from tortoise_auth.exceptions import (
    AuthenticationError,
    ConfigurationError,
    InvalidIdentifierError,
    ServiceUnavailableError,
    ThrottledError,
    TortoiseAuthError,
)
from tortoise_auth.flows.core import Core
from tortoise_auth.models import user_table
from tortoise_auth.passwords import is_usable_hash
from tortoise_auth.throttling import Attempt, Reservation, Throttle, TooEarly, source_of
from tortoise_auth.throttling.waiting import OpenAttempt, OpenAttempts
from tortoise_auth.users import AbstractUser, UserT

logger = logging.getLogger("tortoise_auth.flows.password_check")

ResultT = TypeVar("ResultT")

_MAX_IDENTIFIER_LENGTH = 320
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
class _Case(Generic[UserT]):
    """A password that is to be checked: whose, and what to tell if it is refused."""

    identifier: str
    user: UserT | None
    context: RequestContext
    failed: Callable[[FailureReason], Event]
    rehash: bool = True


@dataclass(frozen=True, slots=True)
class _Refused:
    """A password that was wrong, or not looked at: what to tell, and then to raise."""

    error: AuthenticationError | ThrottledError
    events: Sequence[Event]
    lock: _Lock | None = None


@dataclass(frozen=True, slots=True)
class _Lock:
    """A lock that is due, or that nobody was told of.

    Attributes:
        throttle: Locks the account.
        reservation: The attempt that found it.
        event: What to tell; nothing if there is no such account.
    """

    throttle: Throttle
    reservation: Reservation
    event: AccountLocked[Any] | None


class PasswordCheck(Generic[UserT]):
    """Checks passwords of one user model.

    Args:
        core: The parts of the service.
    """

    def __init__(self, core: Core[UserT]) -> None:
        self._core = core
        self._user_model = core.user_model
        self._sessions = core.sessions
        self._throttle = core.throttle
        self._clock = core.clock
        # Hides identifiers from a reader of the counters, and keeps guessers from choosing which
        # of them share one.
        self._secret = core.config.keys[0].derive("throttle")
        self._open_attempts = OpenAttempts()

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
        return await self._check(_Case(identifier, user, context, failed), password)

    async def check_current(self, user: UserT, password: str, context: RequestContext) -> str:
        """Check the password of somebody who is logged in; return the stored hash it matches.

        Raises:
            AuthenticationError, ThrottledError: As `check_login` does.
        """
        connection = self._sessions.connection()
        user_now = await self._user_model.filter(pk=user.pk).using_db(connection).first()
        identifier = str(getattr(user, user.identifier_field))
        failed = partial(self.change_failed, user, context)
        case = _Case(identifier, user_now, context, failed, rehash=False)
        return (await self._check(case, password)).stored

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
        await self._report([event])
        return AuthenticationError()

    async def _check(self, case: _Case[UserT], password: str) -> Verified[UserT]:
        attempt = self._attempt(case)
        with self._open_attempts.attempt(attempt.account, attempt.source) as place:
            try:
                reservation = await self._reserve(case, attempt, place)
            except ThrottledError as throttled:
                outcome: Verified[UserT] | _Refused = self._throttled(case, throttled.retry_after)
            else:
                outcome = await self._answer(case, password, reservation, place)
            if isinstance(outcome, Verified):
                return outcome
        await self._tell(outcome)  # slow handlers are in nobody's way here
        raise outcome.error

    async def _answer(
        self,
        case: _Case[UserT],
        password: str,
        reservation: Reservation | None,
        place: OpenAttempt,
    ) -> Verified[UserT] | _Refused:
        user = case.user if case.user is not None and case.user.is_active else None
        locked = reservation is not None and reservation.locked
        stored = user.password if user is not None and not locked else None
        try:
            valid, replacement = await self._verify(case, password, stored, reservation)
        except asyncio.CancelledError:  # the attempt counts all the same, and so it locks
            self._tell_later(self._refused(case, reservation, only_lock=True))
            raise
        except Exception:
            place.costs_nothing = True
            raise
        if valid and user is not None and stored is not None:
            await self._succeeded(reservation)
            place.costs_nothing = True
            return Verified(user, stored, replacement)
        refused = self._refused(case, reservation)
        try:
            await self._failed(reservation)
        except BaseException:  # the password was wrong, whatever is wrong with the throttle
            self._tell_later(refused)
            raise
        return refused

    def _throttled(self, case: _Case[UserT], retry_after: float) -> _Refused:
        refusal = case.failed("throttled")
        told = LoginThrottled(
            identifier=_shown(case.identifier),
            retry_after=retry_after,
            attempted="login" if isinstance(refusal, UserLoginFailed) else "password_change",
            subject_id=_id(case.user),
            context=case.context,
            occurred_at=self._clock(),
        )
        return _Refused(ThrottledError(retry_after), [refusal, told])

    def _refused(
        self, case: _Case[UserT], reservation: Reservation | None, *, only_lock: bool = False
    ) -> _Refused:
        locked = reservation is not None and reservation.locked
        events = [] if only_lock else [case.failed(_reason(case.user, locked=locked))]
        lock = None
        if self._throttle is not None and reservation is not None:
            if reservation.locks or reservation.untold:
                lock = _Lock(self._throttle, reservation, self._lock_of(case))
        return _Refused(AuthenticationError(), events, lock)

    def _lock_of(self, case: _Case[UserT]) -> AccountLocked[UserT] | None:
        if case.user is None:  # nobody's lock is told to nobody
            return None
        return AccountLocked(
            user=case.user,
            subject_id=_id(case.user),
            context=case.context,
            occurred_at=self._clock(),
        )

    async def _tell(self, refused: _Refused, patience: float | None = _PATIENCE) -> None:
        """Tell of a refusal; and of a lock, if it is one by now and nobody else tells it."""
        if refused.lock is None:
            await self._report(refused.events)
            return
        locking = asyncio.ensure_future(
            _available(refused.lock.throttle.lock(refused.lock.reservation), patience)
        )
        try:
            await wait_uncancelled(locking)
        except asyncio.CancelledError:
            telling = self._tell_locked(refused, refused.lock, locking)
            self._core.spawn(telling, "report of a lock")
            raise
        await self._tell_locked(refused, refused.lock, locking)

    async def _tell_locked(
        self, refused: _Refused, lock: _Lock, locking: asyncio.Future[bool]
    ) -> None:
        locked = not locking.exception() and locking.result()
        told = [lock.event] if locked and lock.event is not None else []
        try:
            await self._report([*told, *refused.events])
        except asyncio.CancelledError:  # but the report goes on
            if locked:
                told_late = _available(lock.throttle.told(lock.reservation))
                self._core.spawn(told_late, "count of a login")
            raise
        if locking.result():  # it raises what was wrong with the throttle
            await self._settle(lock.throttle.told(lock.reservation))

    async def _report(self, events: Sequence[Event]) -> None:
        connection = self._sessions.connection()
        await emit_failure(
            *events, connection=connection, emitter=self._core.emitter, clock=self._clock
        )

    def _tell_later(self, refused: _Refused) -> None:
        """Do that for a caller who is gone, or has other news."""
        if refused.events or refused.lock:
            self._core.spawn(self._tell(refused, patience=None), "report of a refused password")

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
        case: _Case[UserT],
        password: str,
        stored: str | None,
        reservation: Reservation | None,
    ) -> tuple[bool, str | None]:
        """Tell whether a password is right, and return a hash to replace one that is outdated."""
        if stored is not None and is_usable_hash(stored) and not self._core.passwords.knows(stored):
            self._warn_of_no_hash(case.user)
        try:
            verification = await self._core.passwords.verify(password, stored)
            outdated = case.rehash and verification.outdated
            replacement = await self._core.passwords.hash(password) if outdated else None
        except Exception:
            # Our own fault, so it costs nobody an attempt. A cancellation does: who hangs up in
            # time would guess for free.
            if self._throttle is not None and reservation is not None:
                await self._settle(self._throttle.released(reservation))
            raise
        return verification.valid, replacement

    def _warn_of_no_hash(self, user: UserT | None) -> None:
        by_name = self._user_model._meta.pk_attr == self._user_model.identifier_field
        logger.warning(
            "%s has something for a password that is no hash, or none that can be checked here: "
            "is it from `create` instead of `create_user`, or of bcrypt without the extra bcrypt? "
            "`set_password` mends it",
            f"An account of {self._user_model.__name__}" if by_name else repr(user),
        )

    def _attempt(self, case: _Case[UserT]) -> Attempt:
        source = source_of(case.context.ip)

        async def familiar() -> bool:
            return await self._sessions.were_opened_from(_id(case.user) or "", source)

        return Attempt(
            account=self._account(case.identifier, case.user),
            source=None if source is None else self._hidden(f"{self._table}:{source}"),
            familiar=familiar,
        )

    async def _reserve(
        self, case: _Case[UserT], attempt: Attempt, place: OpenAttempt
    ) -> Reservation | None:
        """Count an attempt; if there were too many, once more for each that turns out to cost nothing.

        Not in a transaction of the caller: the others may wait for the connection that it holds.
        """
        if self._throttle is None:
            return None
        outside = not is_transaction(self._sessions.connection())
        while True:
            try:
                reservation = await self._counted(self._throttle, case, attempt)
            except TooEarly as refusal:
                group = attempt.source if refusal.of_source else attempt.account
                if not outside or group is None or not await place.is_let_in(group):
                    raise
                continue
            if not (reservation.untold and outside and place.has_company(attempt.account)):
                return reservation
            # Those who are being checked decide whether it is locked.
            await self._settle(self._throttle.released(reservation))
            if not await place.is_let_in(attempt.account):
                return await self._counted(self._throttle, case, attempt)

    async def _counted(
        self, throttle: Throttle, case: _Case[UserT], attempt: Attempt
    ) -> Reservation:
        """Count an attempt to the end, even if the caller hangs up: it may be the one that locks."""
        reserving = asyncio.ensure_future(_available(throttle.reserve(attempt), _PATIENCE))
        try:
            await wait_uncancelled(reserving)
        except asyncio.CancelledError:
            if not reserving.cancelled() and reserving.exception() is None:
                reservation = reserving.result()
                if isinstance(reservation, Reservation):
                    self._tell_later(self._refused(case, reservation, only_lock=True))
            raise
        reservation = reserving.result()
        if not isinstance(reservation, Reservation):
            raise ConfigurationError(
                f"{type(throttle).__name__}.reserve() must return a Reservation, or raise "
                f"ThrottledError; it returned {type(reservation).__name__}"
            )
        return reservation

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
            self._core.spawn(_available(counting), "count of a login")
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
    """Return an identifier as events carry it: text, bounded and sanitized."""
    return sanitize_text(identifier if isinstance(identifier, str) else "", _MAX_IDENTIFIER_LENGTH)


def _id(user: UserT | None) -> str | None:
    return None if user is None or user.pk is None else str(user.pk)


def _reason(user: AbstractUser | None, *, locked: bool) -> FailureReason:
    if user is None:
        return "not_found"
    if not user.is_active:
        return "inactive"
    return "locked" if locked else "bad_password"
