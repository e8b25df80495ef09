"""`AuthService`: the one front object. It puts the mechanisms in order and owns none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Generic, Literal, TypeVar, get_args
from uuid import UUID

from tortoise.fields import CharField, TextField

from tortoise_auth.clock import Clock, utc_now
from tortoise_auth.config import AuthConfig, checked_clock
from tortoise_auth.context import RequestContext, current_context
from tortoise_auth.credentials import Credentials, Verified
from tortoise_auth.database import (
    guarded,
    is_transaction,
    root_of,
    transaction,
    when_committed,
)
from tortoise_auth.events.catalog import (
    Actor,
    Event,
    PasswordChanged,
    RefreshTokenReused,
    SessionRefreshed,
    SessionRevoked,
    UserActivated,
    UserDeactivated,
    UserLogin,
    UserLogout,
)
from tortoise_auth.events.emitting import EventEmitter
from tortoise_auth.events.relay import Relay, RelaySettings
from tortoise_auth.events.unit_of_work import UnitOfWork, report
from tortoise_auth.exceptions import (
    ConfigurationError,
    EventError,
    TokenError,
    TokenExpiredError,
    TokenInvalidError,
    TokenReusedError,
    TokenRevokedError,
)
from tortoise_auth.models import Session
from tortoise_auth.passwords import PasswordHasher, PasswordPolicy
from tortoise_auth.sessions import AccessClaims, AccessTokens, Found, RefreshToken, Sessions
from tortoise_auth.throttling import DatabaseThrottle, Throttle
from tortoise_auth.users.changes import (
    replace_outdated_hash,
    store_login,
    store_password,
    store_status,
)
from tortoise_auth.users.model import AbstractUser, UserT

EventT = TypeVar("EventT", bound=Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthResult(Generic[UserT]):
    """A session that was opened or refreshed.

    Attributes:
        user: The account, as your own model.
        session: The session; ``session.id`` may be shown and logged.
        access_token: Send it as ``Authorization: Bearer``; not stored anywhere.
        refresh_token: Exchange it once, at ``refresh``. Warning: as good as a password while it
            lives; in a browser keep it in a ``HttpOnly``, ``Secure``, ``SameSite`` cookie.
        access_expires_at: Aware UTC.
        refresh_expires_at: Aware UTC.
    """

    user: UserT
    session: Session
    access_token: str = field(repr=False)
    refresh_token: str = field(repr=False)
    access_expires_at: datetime
    refresh_expires_at: datetime


@dataclass(frozen=True, slots=True)
class Revocation:
    """What a logout or revocation ended.

    Attributes:
        sessions: How many sessions ended; 0 if there was nothing to end.
        user_id: ``str(user.pk)`` of their owner, if it is known.
    """

    sessions: int
    user_id: str | None


class AuthService(Generic[UserT]):
    """Logs in, keeps logged in, logs out.

    Example::

        auth = AuthService(User, AuthConfig(secret=os.environ["AUTH_SECRET"]))

        result = await auth.login("ada@example.com", "correct horse battery staple")
        user = await auth.authenticate(result.access_token)
        result = await auth.refresh(result.refresh_token)
        await auth.logout(result.access_token)

    Every method may raise `ServiceUnavailableError` when the database fails, and
    `ConfigurationError` when Tortoise or the models are not set up. Every method that emits may raise
    `EventError`: if a handler in the transaction refuses, nothing has happened; if the emitter
    propagates the failure of an inline one, it has, and a session whose tokens you do not get is
    ended. An account of another model than ``user_model`` is a `TypeError`; one that is not saved,
    an ``actor`` that does not exist and a ``keep`` that is no session are a `ValueError`.

    Args:
        user_model: Your subclass of `AbstractUser`.
        config: Keys and lifetimes.
        emitter: Where events go; by default the emitter of the user model.
        passwords: What hashes; by default the hasher of the user model.
        policy: Which new passwords are accepted; by default the policy of the user model.
        throttle: How often passwords may be tried; by default a `DatabaseThrottle`. Warning: with
            ``None`` anybody may guess as fast as you can hash.
        clock: The time.

    Raises:
        ConfigurationError: The model is not a concrete subclass of `AbstractUser`, its identifier
            is not a unique column of text, or an argument is of another type.
    """

    def __init__(
        self,
        user_model: type[UserT],
        config: AuthConfig,
        *,
        emitter: EventEmitter | None = None,
        passwords: PasswordHasher | None = None,
        policy: PasswordPolicy | None = None,
        throttle: Throttle | Literal["database"] | None = "database",
        clock: Clock = utc_now,
    ) -> None:
        _check_model(user_model)
        if not isinstance(config, AuthConfig):
            raise ConfigurationError("AuthService takes an AuthConfig: AuthConfig(secret=...)")
        _check_parts(emitter, passwords, policy, throttle)
        self.user_model = user_model
        self.config = config
        self.emitter = emitter if emitter is not None else user_model.emitter
        self.passwords = passwords if passwords is not None else user_model.password_hasher
        self.policy = policy if policy is not None else user_model.password_policy
        self._clock = checked_clock(clock)
        self._sessions = Sessions(user_model, config, clock)
        self._tokens = AccessTokens(config, clock)
        self._throttle = DatabaseThrottle(clock=clock) if throttle == "database" else throttle
        self._credentials = Credentials(
            user_model,
            self._sessions,
            self.passwords,
            self.emitter,
            self._throttle,
            config.keys[0].derive("throttle"),
            clock,
        )

    @guarded
    async def login(
        self,
        identifier: str,
        password: str,
        *,
        context: RequestContext | None = None,
        claims: Mapping[str, object] | None = None,
    ) -> AuthResult[UserT]:
        """Check a password and open a session. Emits ``user_login`` or ``user_login_failed``.

        Args:
            identifier: E-mail address, or what ``identifier_field`` names.
            password: As typed. Never trimmed.
            context: Circumstances of the request, for the session and the event.
            claims: Further claims for this one access token. Warning: whoever holds the token can
                read them, and they stay true until it expires.

        Raises:
            AuthenticationError: One and the same for every reason (OWASP ASVS 6.3.8).
            ThrottledError: Too many attempts; the password was not even looked at.
            ValueError: *claims* names a claim that is ours or holds what JSON cannot.
        """
        AccessTokens.check_extra(claims or {})
        context = current_context(context)
        verified = await self._credentials.check_login(identifier, password, context)
        opened = await self._open_session(verified, context)
        if opened is None:
            # The password was changed or the account closed while the hash was computed.
            failed = self._credentials.login_failed(
                identifier, verified.user, context, "bad_password"
            )
            raise await self._credentials.refuse(failed)
        return self._result(verified.user, *opened, claims)

    @guarded
    async def authenticate(self, access_token: str) -> UserT:
        """Return the user of an access token, if token, session and user are alive now.

        One SQL query. A logout, password change or deactivation is seen at once.

        Raises:
            TokenInvalidError: It is not one of our access tokens.
            TokenExpiredError: It was.
            TokenRevokedError: Its session ended, or the user is inactive or gone.
        """
        claims = self._tokens.read(access_token)
        found = await self._sessions.find(claims.session_id, claims.subject)
        if found is None:
            raise TokenRevokedError
        found.require_alive(self._clock())
        return found.user

    def decode(self, access_token: str) -> AccessClaims:
        """Return what a genuine, unexpired access token says, asking no database.

        Warning: a session that ended since is not noticed. For services that cannot reach the
        database and can live with ``access_token_lifetime``.

        Raises:
            TokenInvalidError: It is not one of our access tokens.
            TokenExpiredError: It was.
        """
        return self._tokens.read(access_token)

    @guarded
    async def refresh(
        self,
        refresh_token: str,
        *,
        context: RequestContext | None = None,
        claims: Mapping[str, object] | None = None,
    ) -> AuthResult[UserT]:
        """Exchange a refresh token for a new pair. Emits ``session_refreshed``.

        Of any number of concurrent callers exactly one succeeds. The others have presented a spent
        token, and that ends the session (RFC 9700, 4.14.2) and emits ``refresh_token_reused``; see
        ``AuthConfig.refresh_reuse_grace`` for clients that cannot help it.

        Args:
            refresh_token: The unspent token.
            context: Circumstances of the request.
            claims: Further claims for the new access token; those given to ``login`` are not kept.

        Raises:
            TokenInvalidError: It is no refresh token of ours.
            TokenExpiredError: It lay idle for too long, or the session is over.
            TokenRevokedError: The session ended, or the user is inactive or gone.
            TokenReusedError: It was spent before. The session is over.
            ValueError: *claims* names a claim that is ours or holds what JSON cannot.
        """
        AccessTokens.check_extra(claims or {})
        context = current_context(context)
        presented = RefreshToken.parse(refresh_token)
        while True:
            found = await self._sessions.find_by_refresh_token(presented)
            if found is None:
                raise TokenInvalidError
            following = await self._rotate(found, presented, context)
            if following is not None:
                return self._result(found.user, found.session, following, claims)
            # Somebody else was first: look again, and see a spent token.

    @guarded
    async def logout(self, token: str, *, context: RequestContext | None = None) -> Revocation:
        """End the session of an access or refresh token. Emits ``user_logout`` if one ended.

        Once this returns neither token of the session works. Works with expired tokens, twice, and
        with garbage, which ends nothing and raises nothing (RFC 7009, 2.2).

        Args:
            token: Either token.
            context: Circumstances of the request.

        Returns:
            How many sessions ended: 1 or 0.

        Raises:
            TypeError: It is a result or a session, and not a token: a mistake that would else log
                nobody out, silently.
        """
        _refuse_what_holds_tokens(token, "logout")
        found = await self._find_session(token)
        if found is None:
            return Revocation(0, None)
        return await self._end_session(found, UserLogout, context, actor="user")

    @guarded
    async def logout_all(
        self,
        user: UserT,
        *,
        keep: Session | UUID | str | None = None,
        actor: Actor = "user",
        context: RequestContext | None = None,
    ) -> Revocation:
        """End every session of *user*. Emits ``user_logout`` if one ended.

        Args:
            user: The account.
            keep: A session, or its id, that goes on.
            actor: Whom the event names: ``"admin"`` if it was not the user.
            context: Circumstances of the request.

        Returns:
            How many sessions ended.
        """
        self._require_own(user, actor)
        async with self._unit_of_work() as unit:
            ended = await self._sessions.revoke_all(user, unit.connection, keep=_session_id(keep))
            if ended:
                self._record(
                    unit,
                    UserLogout,
                    user,
                    context,
                    sessions_ended=ended,
                    everywhere=True,
                    actor=actor,
                )
        return Revocation(ended, str(user.pk))

    @guarded
    async def set_password(
        self,
        user: UserT,
        new_password: str,
        *,
        keep: Session | UUID | str | None = None,
        actor: Actor = "user",
        context: RequestContext | None = None,
    ) -> None:
        """Store a new password and end all other sessions. Emits ``password_changed``, once.

        Nobody is asked for the current password: for password resets and administrators. A settings
        page calls `change_password`.

        Args:
            user: The account.
            new_password: Checked by the policy.
            keep: A session, or its id, that goes on.
            actor: Whom the event names: ``"admin"`` if it was not the user.
            context: Circumstances of the request.

        Raises:
            PasswordPolicyError: With every rule that the password breaks.
            ValueError: The account is not saved.
        """
        self._require_own(user, actor)
        self.policy.check(new_password, about=user.words_about())
        hashed = await self.passwords.hash(new_password)
        await self._replace_password(
            user, hashed, keep=keep, instead_of=None, actor=actor, context=context
        )

    @guarded
    async def change_password(
        self,
        user: UserT,
        current_password: str,
        new_password: str,
        *,
        keep: Session | UUID | str | None = None,
        context: RequestContext | None = None,
    ) -> None:
        """The same as `set_password`, after checking the current password (OWASP ASVS 6.2.3).

        A wrong current password counts as a refused login does, and emits
        ``password_change_failed``.

        Args:
            user: The account.
            current_password: As typed.
            new_password: Checked by the policy.
            keep: A session, or its id, that goes on: the one of this request.
            context: Circumstances of the request.

        Raises:
            AuthenticationError: The current password is wrong, or the account is inactive.
            ThrottledError: Too many attempts; the password was not even looked at.
            PasswordPolicyError: With every rule that the new password breaks.
        """
        self._require_own(user)
        context = current_context(context)
        stored = await self._credentials.check_current(user, current_password, context)
        self.policy.check(new_password, about=user.words_about())
        hashed = await self.passwords.hash(new_password)
        changed = await self._replace_password(
            user, hashed, keep=keep, instead_of=stored, actor="user", context=context
        )
        if not changed:
            failed = self._credentials.change_failed(user, context, "bad_password")
            raise await self._credentials.refuse(failed)

    @guarded
    async def sessions(self, user: UserT) -> list[Session]:
        """Return the live sessions of *user*, the one used last first."""
        self._require_own(user)
        return await self._sessions.list(user)

    @guarded
    async def revoke_session(
        self,
        session_id: Session | UUID | str,
        *,
        user: UserT | None = None,
        actor: Actor = "user",
        context: RequestContext | None = None,
    ) -> Revocation:
        """End one session by its public id. Emits ``session_revoked`` if it ended.

        Args:
            session_id: ``session.id``, or the session.
            user: End it only if it belongs to this account. Warning: pass it whenever the id comes
                from a visitor, who could name somebody else's session.
            actor: Whom the event names: ``"admin"`` if it was not the user.
            context: Circumstances of the request.

        Returns:
            How many sessions ended: 1 or 0.
        """
        _require_actor(actor)
        if user is not None:
            self._require_own(user)
        if isinstance(session_id, Session):
            session_id = session_id.id
        _refuse_what_holds_tokens(session_id, "revoke_session")
        found = await self._sessions.find_by_id(session_id)
        if found is None or (user is not None and found.session.user_id != str(user.pk)):
            return Revocation(0, None)
        return await self._end_session(found, SessionRevoked, context, actor=actor)

    @guarded
    async def deactivate(
        self, user: UserT, *, actor: Actor = "admin", context: RequestContext | None = None
    ) -> Revocation:
        """Close the account: no login, no session, at once. Emits ``user_deactivated``.

        Closing a closed account changes and emits nothing.

        Args:
            user: The account.
            actor: Whom the event names: ``"user"`` if somebody closed their own account.
            context: Circumstances of the request.

        Returns:
            How many sessions ended.
        """
        self._require_own(user, actor)
        ended = 0
        async with self._unit_of_work() as unit:
            if await store_status(user, unit, is_active=False, at=self._clock()):
                ended = await self._sessions.revoke_all(user, unit.connection)
                self._record(
                    unit, UserDeactivated, user, context, sessions_ended=ended, actor=actor
                )
        return Revocation(ended, str(user.pk))

    @guarded
    async def activate(
        self, user: UserT, *, actor: Actor = "admin", context: RequestContext | None = None
    ) -> None:
        """Open a closed account again. Emits ``user_activated``. No session comes back.

        Args:
            user: The account.
            actor: Whom the event names.
            context: Circumstances of the request.
        """
        self._require_own(user, actor)
        async with self._unit_of_work() as unit:
            if await store_status(user, unit, is_active=True, at=self._clock()):
                self._record(unit, UserActivated, user, context, actor=actor)

    @guarded
    async def purge_expired(self) -> int:
        """Delete the rows of sessions whose lifetime is over; return how many. For a cron job.

        Old counters of the database throttle go, too.
        """
        purged = await self._sessions.purge()
        if isinstance(self._throttle, DatabaseThrottle):
            await self._throttle.purge()
        return purged

    def relay(
        self,
        *,
        batch_size: int = 100,
        concurrency: int = 10,
        max_attempts: int = 10,
        lease: timedelta = timedelta(seconds=60),
        backoff: timedelta = timedelta(seconds=1),
        max_backoff: timedelta = timedelta(hours=1),
        poll_interval: timedelta = timedelta(seconds=1),
        stop_timeout: timedelta = timedelta(seconds=10),
    ) -> Relay[UserT]:
        """Return a relay for the durable subscriptions of this service's emitter.

        Example::

            async with auth.relay():                  # in the lifespan of the app
                yield
            delivered = await auth.relay().drain()    # or once

        Any number may run at the same time, in any number of processes. See `RelaySettings` for the
        arguments.

        Raises:
            ValueError: A number or duration is not positive.
        """
        settings = RelaySettings(
            batch_size=batch_size,
            concurrency=concurrency,
            max_attempts=max_attempts,
            lease=lease,
            backoff=backoff,
            max_backoff=max_backoff,
            poll_interval=poll_interval,
            stop_timeout=stop_timeout,
        )
        return Relay(self.emitter, self.user_model, settings, clock=self._clock)

    def _require_own(self, user: UserT, actor: Actor = "user") -> None:
        """Refuse the account of another model, whose key is somebody else's here, and a typo."""
        _require_actor(actor)
        if not isinstance(user, self.user_model):
            raise TypeError(
                f"This AuthService serves {self.user_model.__name__}, not {type(user).__name__}"
            )
        if user.pk is None:
            raise ValueError(f"{user!r} is not in the database; save it first")

    def _event(
        self,
        kind: Callable[..., EventT],
        user: UserT,
        context: RequestContext | None,
        **details: object,
    ) -> EventT:
        """Return an event that happened to *user* now."""
        return kind(
            user=user,
            subject_id=str(user.pk),
            context=current_context(context),
            occurred_at=self._clock(),
            **details,
        )

    def _record(
        self,
        unit: UnitOfWork,
        kind: Callable[..., Event],
        user: UserT,
        context: RequestContext | None,
        **details: object,
    ) -> None:
        unit.record(self._event(kind, user, context, **details))

    def _unit_of_work(self) -> UnitOfWork:
        return UnitOfWork(self._sessions.connection(), self.emitter, clock=self._clock)

    def _result(
        self,
        user: UserT,
        session: Session,
        refresh_token: RefreshToken,
        claims: Mapping[str, object] | None,
    ) -> AuthResult[UserT]:
        access_token, access_expires_at = self._tokens.issue(
            subject=session.user_id,  # not the live object's: a handler may have changed that
            session_id=str(session.id),
            session_ends=session.expires_at,
            extra=claims or {},
        )
        return AuthResult(
            user=user,
            session=session,
            access_token=access_token,
            refresh_token=refresh_token.text,
            access_expires_at=access_expires_at,
            refresh_expires_at=session.refresh_expires_at,
        )

    async def _open_session(
        self, verified: Verified[UserT], context: RequestContext
    ) -> tuple[Session, RefreshToken] | None:
        """Save the login; ``None`` if the account is not as it was when the password was checked."""
        user, replacement = verified.user, verified.replacement
        opened: tuple[Session, RefreshToken] | None = None
        unit = self._unit_of_work()
        try:
            async with unit:
                if await store_login(
                    user, unit, session_version=user.session_version, at=self._clock()
                ):
                    if replacement is not None:
                        await replace_outdated_hash(
                            user, replacement, unit, instead_of=verified.stored
                        )
                    opened = await self._sessions.open(user, context, unit.connection)
                    self._record(unit, UserLogin, user, context, session_id=str(opened[0].id))
        except BaseException:
            if unit.committed and opened is not None:
                # The caller was cancelled, or a handler raised: nobody will ever hold the tokens.
                self._end_orphan_later(user, opened[0], context)
            raise
        return opened

    def _end_orphan_later(self, user: UserT, session: Session, context: RequestContext) -> None:
        """End a session that nobody holds, as soon as it is there for other connections."""
        when_committed(
            self._sessions.connection(),
            lambda: self.emitter.detach(self._end_orphan(user, session, context), "orphan session"),
        )

    async def _end_orphan(self, user: UserT, session: Session, context: RequestContext) -> None:
        async with self._unit_of_work() as unit:
            if await self._sessions.revoke(session, unit.connection):
                self._record(
                    unit, SessionRevoked, user, context, session_id=str(session.id), actor="system"
                )

    async def _end_session(
        self,
        found: Found[UserT],
        kind: Callable[..., Event],
        context: RequestContext | None,
        *,
        actor: Actor,
    ) -> Revocation:
        """Revoke one session; tell it, and count it, only if it was not over anyway."""
        ended = False
        if found.session.revoked_at is None:
            async with self._unit_of_work() as unit:
                revoked = await self._sessions.revoke(found.session, unit.connection)
                ended = revoked and found.is_alive(self._clock())
                if ended:
                    session_id = str(found.session.id)
                    self._record(
                        unit, kind, found.user, context, session_id=session_id, actor=actor
                    )
        return Revocation(int(ended), found.session.user_id)

    async def _rotate(
        self, found: Found[UserT], presented: RefreshToken, context: RequestContext
    ) -> RefreshToken | None:
        session, user, now = found.session, found.user, self._clock()
        if session.refresh_expires_at <= now or session.expires_at <= now:
            raise TokenExpiredError
        if not self._sessions.is_spendable(session, presented):
            raise await self._reused(found, context)
        found.require_alive(now)
        following: RefreshToken | None = None
        unit = self._unit_of_work()
        try:
            async with unit:
                following = await self._sessions.rotate(session, presented, context, unit)
                if following is not None:
                    self._record(
                        unit,
                        SessionRefreshed,
                        user,
                        context,
                        session_id=str(session.id),
                        generation=session.generation + 1,
                    )
        except BaseException:
            if unit.committed and following is not None and not self.config.refresh_reuse_grace:
                # The caller was cancelled, or a handler raised: nobody will ever hold the new
                # token, and the old one would be taken for a stolen one.
                self._end_orphan_later(user, session, context)
            raise
        return following

    async def _reused(self, found: Found[UserT], context: RequestContext) -> TokenReusedError:
        """End the session of a spent token; tell it once, and only if it was alive."""
        if not found.is_alive(self._clock()):
            return TokenReusedError()
        event = self._event(
            RefreshTokenReused,
            found.user,
            context,
            session_id=str(found.session.id),
        )
        connection = self._sessions.connection()
        if is_transaction(connection):
            # The caller's transaction sees the session end now, and it ends for good even if that
            # transaction is rolled back, most likely because of the error that is raised next.
            if await self._sessions.revoke(found.session, connection):
                self.emitter.detach(self._revoke_for_good(found.session), "session revocation")
                await report(event, connection=connection, emitter=self.emitter, clock=self._clock)
            return TokenReusedError()
        unit = self._unit_of_work()
        try:
            async with unit:
                if await self._sessions.revoke(found.session, unit.connection):
                    unit.record(event)
        except EventError:
            if not unit.committed:  # a handler may veto the event, but keeps no session alive
                await self._revoke_for_good(found.session)
            raise
        return TokenReusedError()

    async def _revoke_for_good(self, session: Session) -> None:
        async with transaction(root_of(self._sessions.connection())) as own:
            await self._sessions.revoke(session, own)

    async def _find_session(self, token: str) -> Found[UserT] | None:
        try:
            if isinstance(token, str) and RefreshToken.looks_like(token):
                return await self._sessions.find_by_refresh_token(RefreshToken.parse(token))
            claims = self._tokens.read(token, even_if_expired=True)
        except TokenError:
            return None
        return await self._sessions.find(claims.session_id, claims.subject)

    async def _replace_password(
        self,
        user: UserT,
        hashed: str,
        *,
        keep: Session | UUID | str | None,
        instead_of: str | None,
        actor: Actor,
        context: RequestContext | None,
    ) -> bool:
        kept, now = _session_id(keep), self._clock()
        async with self._unit_of_work() as unit:
            version = await store_password(user, hashed, unit, instead_of=instead_of, at=now)
            if version is not None:
                ended = await self._sessions.revoke_all(user, unit.connection, keep=kept)
                if kept is not None:
                    await self._sessions.confirm(kept, user, version, unit.connection)
                self._record(
                    unit, PasswordChanged, user, context, sessions_ended=ended, actor=actor
                )
        return version is not None


def _refuse_what_holds_tokens(value: object, method: str) -> None:
    if isinstance(value, AuthResult | Session):
        what = "result.access_token" if method == "logout" else "result.session"
        raise TypeError(f"{method}() takes {what}, not the {type(value).__name__} itself")


def _require_actor(actor: object) -> None:
    if actor not in get_args(Actor):
        raise ValueError(f"actor={actor!r} is none of {', '.join(get_args(Actor))}")


def _session_id(session: Session | UUID | str | None) -> UUID | None:
    if session is None or isinstance(session, UUID):
        return session
    if isinstance(session, Session):
        return session.id
    try:
        return UUID(session)
    except (ValueError, TypeError, AttributeError):
        raise ValueError("keep= takes a session or its id") from None


def _check_parts(emitter: object, passwords: object, policy: object, throttle: object) -> None:
    kinds: Mapping[str, tuple[object, type]] = {
        "emitter": (emitter, EventEmitter),
        "passwords": (passwords, PasswordHasher),
        "policy": (policy, PasswordPolicy),
    }
    for name, (part, kind) in kinds.items():
        if part is not None and not isinstance(part, kind):
            raise ConfigurationError(f"AuthService: {name}= takes an instance of {kind.__name__}")
    steps = ("reserve", "failed", "succeeded", "released", "lock", "told")
    if throttle in (None, "database"):
        return
    if isinstance(throttle, type) or not all(hasattr(throttle, step) for step in steps):
        raise ConfigurationError(
            "AuthService: throttle= takes DatabaseThrottle(...), LimitsThrottle(...) for Redis, "
            "another Throttle, or None for no limit at all"
        )


def _check_model(user_model: type[AbstractUser]) -> None:
    if not isinstance(user_model, type) or not issubclass(user_model, AbstractUser):
        raise ConfigurationError(
            "AuthService takes your user model: a class of yours that subclasses AbstractUser"
        )
    meta = user_model._meta
    if meta.abstract:
        raise ConfigurationError(
            f"{user_model.__name__} is abstract. Subclass it, or say `abstract = False` in its Meta."
        )
    field = meta.fields_map.get(user_model.identifier_field)
    if not isinstance(field, CharField | TextField) or not (field.unique or field.pk):
        raise ConfigurationError(
            f"{user_model.__name__}.identifier_field is {user_model.identifier_field!r}; the model "
            "needs such a field, a CharField with unique=True"
        )
