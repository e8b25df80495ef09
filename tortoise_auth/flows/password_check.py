"""Checking a password: throttled, at the same cost whatever is wrong, with an event if rejected."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

from tortoise.expressions import Q

from tortoise_auth.context import RequestContext, sanitize_text
from tortoise_auth.database import (
    is_missing_table,
    is_transaction,
    outage,
    translated,
    wait_uncancelled,
)
from tortoise_auth.events.catalog import (
    AccountLocked,
    Event,
    FailureReason,
    LoginThrottled,
    PasswordChangeFailed,
    UserLoginFailed,
)
from tortoise_auth.events.unit_of_work import UnitOfWork, emit_failure
from tortoise_auth.exceptions import (
    AuthenticationError,
    ConfigurationError,
    ThrottledError,
    TortoiseAuthError,
)
from tortoise_auth.flows.core import Core
from tortoise_auth.legible import logger_of
from tortoise_auth.models import user_table
from tortoise_auth.passwords import is_usable_hash
from tortoise_auth.throttling import (
    Attempt,
    DatabaseThrottle,
    Reservation,
    Throttle,
    Unlimited,
    source_of,
)
from tortoise_auth.throttling.waiting import Waiting
from tortoise_auth.users import AbstractUser, UserT
from tortoise_auth.users.changes import lock_password

logger = logger_of("tortoise_auth.flows.password_check")

ResultT = TypeVar("ResultT")

_MAX_IDENTIFIER_LENGTH = 320
_STRANGERS = 1 << 18
"""Counters that all identifiers without an account share, so that guessers cannot fill the table."""
_PATIENCE = 5.0
"""Seconds to wait for a throttle: its store may hang, or its pool be empty for good because each
connection is held by a transaction of a caller that waits for a second one."""


@dataclass(frozen=True, slots=True)
class Verified(Generic[UserT]):
    """A password that was right.

    Attributes:
        user: Its owner, as read before the check.
        stored: The hash that it matches.
        replacement: A hash of today's cost, if the stored one is outdated.
        reservation: The attempt, which is still in flight.
    """

    user: UserT
    stored: str = field(repr=False)
    replacement: str | None = field(repr=False)
    reservation: Reservation = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Case(Generic[UserT]):
    """A password that is to be checked: of which account, and the event if it is rejected."""

    identifier: str
    user: UserT | None
    context: RequestContext
    failed: Callable[[FailureReason], Event]
    rehash: bool = True


class PasswordCheck(Generic[UserT]):
    """Checks passwords of one user model.

    Args:
        core: The parts of the service.
    """

    def __init__(self, core: Core[UserT]) -> None:
        self._core = core
        self._user_model = core.user_model
        self._sessions = core.sessions
        self._throttle: Throttle = Unlimited() if core.throttle is None else core.throttle
        self._clock = core.clock
        # Hides identifiers from a reader of the counters, and keeps guessers from choosing which
        # of them share one.
        self._secret = core.config.keys[0].derive("throttle")
        self._waiting = Waiting()

    async def check_login(
        self, identifier: str, password: str, context: RequestContext
    ) -> Verified[UserT]:
        """Check the password of the account with this identifier.

        The attempt stays in flight until `succeeded`, `lost` or `released` is called.

        Raises:
            AuthenticationError: For whatever reason; its event was emitted.
            ThrottledError: It was not checked; that event was emitted, too.
        """
        user = await self._find_user(identifier)
        failed = partial(self.login_failed, identifier, user, context)
        return await self._check(_Case(identifier, user, context, failed), password)

    async def check_current(self, user: UserT, password: str, context: RequestContext) -> str:
        """Check the password of a user who is logged in; return the stored hash it matches.

        Raises:
            AuthenticationError, ThrottledError: As `check_login` does.
        """
        connection = self._sessions.connection()
        # Read anew: the object of the caller may be older than the last change of the password.
        user_now = await self._user_model.filter(pk=user.pk).using_db(connection).first()
        _, identifier = user.held_identifier()
        failed = partial(self.change_failed, user, context)
        # A hash that is outdated is about to be replaced by the new password.
        case = _Case(identifier, user_now, context, failed, rehash=False)
        verified = await self._check(case, password)
        await self.succeeded(verified)
        return verified.stored

    @property
    def resetting_in_login(self) -> DatabaseThrottle | None:
        """The throttle, if the login is to reset it in its own transaction: cheaper, and atomic.

        Not in a transaction of the caller: its rows would be locked until that ends.
        """
        ours = self._throttle if isinstance(self._throttle, DatabaseThrottle) else None
        return None if is_transaction(self._sessions.connection()) else ours

    async def succeeded(self, verified: Verified[UserT]) -> None:
        """Reset the failures of the account."""
        await self._settle(self._throttle.succeeded(verified.reservation))

    async def source_released(
        self, verified: Verified[UserT], throttle: DatabaseThrottle
    ) -> Verified[UserT]:
        """Give the source its attempt back before the login begins, which resets the account."""
        released = throttle.source_released(verified.reservation)
        return replace(verified, reservation=await _available(released, _PATIENCE))

    async def reset_within(
        self, unit: UnitOfWork, verified: Verified[UserT], throttle: DatabaseThrottle
    ) -> None:
        """Reset the failures of the account in the unit of work that logs in."""
        await _available(throttle.succeeded(verified.reservation, using_db=unit.connection))

    async def lost(self, verified: Verified[UserT]) -> None:
        """Count a right password that opened nothing as a failure: it was replaced or locked."""
        await self._settle(self._throttle.failed(verified.reservation))

    async def reason_now(self, user: UserT) -> FailureReason:
        """Return why a password that was right opens nothing any more."""
        row = self._user_model.filter(pk=user.pk, password_locked_at__isnull=False)
        locked = await row.using_db(self._sessions.connection()).exists()
        return "locked" if locked else "bad_password"

    def release_later(self, verified: Verified[UserT]) -> None:
        """Give the attempt back, because the login was rolled back or cancelled."""
        self._later(_available(self._throttle.released(verified.reservation)))

    async def forget_failures(self, user: UserT) -> None:
        """Reset the failures of an account that is to be unlocked."""
        row = self._user_model.filter(pk=user.pk).using_db(self._sessions.connection())
        for stored in await row.values_list("password", flat=True):
            # The counter is named by the hash in the row; that of the object may be an older one.
            account = self._account("", user, str(stored))
            attempt = Attempt(account=account, source=None)
            await self._settle(self._throttle.succeeded(Reservation(attempt=attempt)))

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
        """Emit that a password was rejected, and return the error to raise: always the same."""
        await self._emit([event])
        return AuthenticationError()

    async def _check(self, case: _Case[UserT], password: str) -> Verified[UserT]:
        try:
            # Before the hash: else a burst is checked as a whole before its first failure is
            # counted.
            reservation = await self._reserve(case)
        except ThrottledError as throttled:
            retry_after = throttled.retry_after
        else:
            return await self._verified(case, password, reservation)
        await self._emit(self._throttled(case, retry_after))
        raise ThrottledError(retry_after)

    async def _verified(
        self, case: _Case[UserT], password: str, reservation: Reservation
    ) -> Verified[UserT]:
        reason = _reason(case.user, reservation)
        # For a closed or locked account no password is compared, not even the right one; the hasher
        # spends one hash all the same, so that the time says nothing (ASVS 6.3.8).
        user = case.user if reason == "bad_password" else None
        stored = None if user is None else user.password
        try:
            valid, replacement = await self._verify(case, password, stored)
        except asyncio.CancelledError:  # else a caller that hangs up in time guesses for free
            self._later(self._failed(case, reservation))
            raise
        except Exception:  # our own fault
            await self._settle(self._throttle.released(reservation))
            raise
        if valid and user is not None and stored is not None:
            return Verified(user, stored, replacement, reservation)
        rejected = [case.failed(reason)]
        try:
            await self._settle(self._failed(case, reservation), lasts=True)
        except BaseException:  # the password was wrong, whatever is wrong with the throttle
            self._later(self._emit(rejected))
            raise
        await self._emit(rejected)
        raise AuthenticationError

    async def _failed(self, case: _Case[UserT], reservation: Reservation) -> None:
        """Count a failure, to the end even if the caller hangs up; lock if it was one too many."""
        locks = reservation.locks or reservation.exceeded
        counting = asyncio.ensure_future(_available(self._throttle.failed(reservation), _PATIENCE))
        try:
            await wait_uncancelled(counting)
            counting.result()
            if locks:
                await self._lock(case)
        except BaseException:
            if locks:  # writes and emits nothing if it was locked just now
                self._later(self._lock(case))
            raise

    async def _lock(self, case: _Case[UserT]) -> None:
        """Lock the password, unless it was changed or a login succeeded since it was read.

        The same statements for an account that does not exist: the answer takes as long.
        """
        identifier = self._user_model.comparable_identifier(case.identifier)
        async with self._core.unit_of_work() as unit:
            now = self._clock()
            locked = await lock_password(self._user_model, identifier, case.user, unit, at=now)
            if locked and case.user is not None:
                unit.record(self._core.event(AccountLocked, case.user, case.context))

    def _throttled(self, case: _Case[UserT], retry_after: float) -> list[Event]:
        refusal = case.failed("throttled")
        throttled = LoginThrottled(
            identifier=_shown(case.identifier),
            retry_after=retry_after,
            attempted="login" if isinstance(refusal, UserLoginFailed) else "password_change",
            subject_id=_id(case.user),
            context=case.context,
            occurred_at=self._clock(),
        )
        return [refusal, throttled]

    async def _emit(self, events: Sequence[Event]) -> None:
        connection = self._sessions.connection()
        await emit_failure(
            *events, connection=connection, emitter=self._core.emitter, clock=self._clock
        )

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        """Do that in a task of its own, outside the caller's transaction."""
        self._core.spawn(work, "count of a login")

    async def _find_user(self, identifier: str) -> UserT | None:
        connection = self._sessions.connection()
        wanted = self._user_model.comparable_identifiers(identifier)
        if not wanted:
            return None
        # One statement for every column, so that it takes as long whichever of them has a match.
        either = Q(*(Q(**{column: value}) for column, value in wanted.items()), join_type=Q.OR)
        rows = await self._user_model.filter(either).using_db(connection).limit(len(wanted))
        if len(rows) < 2:
            return rows[0] if rows else None
        # A row of before may have as user name what is the address of another account: that is
        # the owner.
        owners = (
            row for column, value in wanted.items() for row in rows if getattr(row, column) == value
        )
        return next(owners, None)

    async def _verify(
        self, case: _Case[UserT], password: str, stored: str | None
    ) -> tuple[bool, str | None]:
        """Return whether a password is right, and a hash to replace one that is outdated."""
        if stored is not None and is_usable_hash(stored):
            self._warn_of_hash(case.user, stored)
        verification = await self._core.passwords.verify(password, stored)
        outdated = case.rehash and verification.outdated
        # Here and not in the transaction of the login, which would hold its rows for that long.
        replacement = await self._core.passwords.hash(password) if outdated else None
        return verification.valid, replacement

    def _warn_of_hash(self, user: UserT | None, stored: str) -> None:
        obstacle = self._core.passwords.obstacle(stored)
        if obstacle is None:
            return
        # The `repr` of a user shows the key. Where that is what people type, it stays out of logs.
        by_name = self._user_model._meta.pk_attr in self._user_model.identifier_fields
        owner = f"An account of {self._user_model.__name__}" if by_name else repr(user)
        logger.warning(
            "%s has a password hash that no password can match. %s. `set_password` mends it",
            owner,
            obstacle,
        )

    def _attempt(self, case: _Case[UserT]) -> Attempt:
        source = source_of(case.context.ip)

        async def known_source() -> bool:
            return await self._sessions.were_opened_from(_id(case.user) or "", case.context.ip)

        stored = "" if case.user is None else case.user.password
        return Attempt(
            account=self._account(case.identifier, case.user, stored),
            source=None if source is None else self._hidden(f"{self._table}:{source}"),
            known_source=known_source,
        )

    async def _reserve(self, case: _Case[UserT]) -> Reservation:
        """Count an attempt; wait for others in flight, if only they are in its way.

        Not in a transaction of the caller: the others may wait for the connection that it holds.
        """
        reserve = partial(self._reserve_once, case, self._attempt(case))
        if is_transaction(self._sessions.connection()):
            return await reserve()
        return await self._waiting.reserve(reserve)

    async def _reserve_once(self, case: _Case[UserT], attempt: Attempt) -> Reservation:
        """Count an attempt to the end, even if the caller hangs up: then it has failed."""
        reserving = asyncio.ensure_future(_available(self._throttle.reserve(attempt), _PATIENCE))
        try:
            await wait_uncancelled(reserving)
        except asyncio.CancelledError:
            if not reserving.cancelled() and reserving.exception() is None:
                reservation = reserving.result()
                if isinstance(reservation, Reservation):
                    self._later(self._failed(case, reservation))
            raise
        reservation = reserving.result()
        if not isinstance(reservation, Reservation):
            raise ConfigurationError(
                f"{type(self._throttle).__name__}.reserve() must return a Reservation, or raise "
                f"ThrottledError; it returned {type(reservation).__name__}"
            )
        return reservation

    async def _settle(self, counting: Coroutine[Any, Any, None], *, lasts: bool = False) -> None:
        """Count how an attempt ended; after a transaction of the caller, if there is one.

        Within, it would wait for a second connection, or go with a rollback.
        """
        if is_transaction(self._sessions.connection()):
            self._later(_available(counting))
        else:
            await (counting if lasts else _available(counting, _PATIENCE))

    def _account(self, identifier: str, user: UserT | None, stored: str) -> str:
        """Return what stands for an account: its key and hash, so that a new password starts anew."""
        if user is not None:
            return self._hidden(f"{self._table}:{user.pk}:{stored}")
        wanted = self._user_model.comparable_identifiers(identifier)
        typed = next(iter(wanted.values()), _shown(identifier))
        # The prefix keeps strangers apart from accounts, whose counters are plain hexadecimal.
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
        if is_missing_table(error):
            failure = translated(error, "login")
        else:
            kind = type(error).__name__
            failure = outage(error, f"The throttle could not count this attempt ({kind})")
    # Outside of `except`: what a store raised may quote its URI or values, and would be the
    # context.
    raise failure


def _shown(identifier: object) -> str:
    """Return an identifier as events carry it: text, bounded and sanitized."""
    return sanitize_text(identifier if isinstance(identifier, str) else "", _MAX_IDENTIFIER_LENGTH)


def _id(user: UserT | None) -> str | None:
    return None if user is None or user.pk is None else str(user.pk)


def _reason(user: AbstractUser | None, reservation: Reservation) -> FailureReason:
    """Return why no password is right for this account; ``bad_password`` if one may be."""
    if user is None:
        return "not_found"
    if not user.is_active:
        return "inactive"
    return (
        "locked" if reservation.exceeded or user.password_locked_at is not None else "bad_password"
    )
