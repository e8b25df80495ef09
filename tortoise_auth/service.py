"""`AuthService`: the front object. Each method is one call into a flow."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Generic, Literal
from uuid import UUID

from tortoise_auth.clock import Clock, utc_now
from tortoise_auth.config import AuthConfig
from tortoise_auth.context import RequestContext
from tortoise_auth.database import translates_database_errors
from tortoise_auth.events.catalog import Actor
from tortoise_auth.events.event_emitter import EventEmitter
from tortoise_auth.events.relay import Relay, RelaySettings
from tortoise_auth.flows import (
    account_status,
    authentication,
    logout,
    password_change,
    password_login,
    refresh,
    registration,
    session_upkeep,
)
from tortoise_auth.flows.authentication import Authenticated
from tortoise_auth.flows.core import Core
from tortoise_auth.flows.logout import Revocation
from tortoise_auth.flows.password_check import PasswordCheck
from tortoise_auth.flows.signin import AuthResult
from tortoise_auth.models import Session
from tortoise_auth.passwords import PasswordHasher, PasswordPolicy
from tortoise_auth.sessions import AccessClaims
from tortoise_auth.throttling import Throttle
from tortoise_auth.users.model import UserT

__all__ = ["AuthResult", "AuthService", "Authenticated", "Revocation"]


class AuthService(Generic[UserT]):
    """Logs in, keeps logged in, logs out.

    Example::

        auth = AuthService(User, AuthConfig(secret=os.environ["AUTH_SECRET"]))

        user = await auth.create_user(email="ada@example.com", password="correct horse battery staple")
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
            ``None`` passwords may be guessed as fast as you can hash.
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
        self._core = Core(
            user_model,
            config,
            emitter=emitter,
            passwords=passwords,
            policy=policy,
            throttle=throttle,
            clock=clock,
        )
        self.user_model = user_model
        self.config = config
        self._passwords = PasswordCheck(self._core)

    @property
    def emitter(self) -> EventEmitter:
        """Where events go."""
        return self._core.emitter

    @property
    def passwords(self) -> PasswordHasher:
        """Hashes and verifies passwords."""
        return self._core.passwords

    @property
    def policy(self) -> PasswordPolicy:
        """Says which new passwords are accepted."""
        return self._core.policy

    @translates_database_errors
    async def create_user(
        self,
        /,
        *,
        password: str | None = None,
        context: RequestContext | None = None,
        **values: object,
    ) -> UserT:
        """Create an account by the policy, hasher and clock of this service. Emits ``user_registered``.

        Safe to call with a form's fields, and refuses the same ones, as `AbstractUser.create_user`.

        Args:
            password: The password, or ``None`` for an account that cannot log in with one.
            context: Circumstances of the request.
            **values: The columns: ``email=``, your own.

        Raises:
            InvalidIdentifierError: The e-mail address or user name cannot be one.
            IdentifierTakenError: There is such an account. Warning: what the visitor reads must not
                say so (OWASP ASVS 6.3.8).
            PasswordPolicyError: With every rule that the password breaks.
            ValueError: A column cannot be set so; the message says which and why.
        """
        return await registration.create_user(self._core, password, values, context)

    @translates_database_errors
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
            claims: Further claims for this one access token. Warning: a holder of the token can
                read them, and they stay true until it expires.

        Raises:
            AuthenticationError: One and the same for every reason (OWASP ASVS 6.3.8).
            ThrottledError: Too many attempts; the password was not even looked at.
            ValueError: *claims* names a claim that is ours or holds what JSON cannot.
        """
        return await password_login.login(
            self._core, self._passwords, identifier, password, context, claims
        )

    @translates_database_errors
    async def authenticate(self, access_token: str) -> UserT:
        """Return the user of an access token, if token, session and user are alive now.

        One SQL query. A logout, password change or deactivation is seen at once.

        Raises:
            TokenInvalidError: It is not one of our access tokens.
            TokenExpiredError: It was.
            TokenRevokedError: Its session ended, or the user is inactive or gone.
        """
        return await authentication.authenticate(self._core, access_token)

    @translates_database_errors
    async def authenticated(self, access_token: str) -> Authenticated[UserT]:
        """Return the user of an access token with its session and its claims.

        The same check as `authenticate`, the same SQL query, and the same errors.
        """
        return await authentication.authenticated(self._core, access_token)

    def decode(self, access_token: str) -> AccessClaims:
        """Return what a genuine, unexpired access token says, asking no database.

        Warning: a session that ended since is not noticed. For services that cannot reach the
        database and can live with ``access_token_lifetime``.

        Raises:
            TokenInvalidError: It is not one of our access tokens.
            TokenExpiredError: It was.
        """
        return self._core.tokens.read(access_token)

    @translates_database_errors
    async def refresh(
        self,
        refresh_token: str,
        *,
        context: RequestContext | None = None,
        claims: Mapping[str, object] | None = None,
    ) -> AuthResult[UserT]:
        """Exchange a refresh token for a new pair. Emits ``session_refreshed``.

        Of any number of concurrent callers exactly one succeeds. The others have presented a spent
        token, and that ends the session (RFC 9700, 4.14.2) and emits ``refresh_token_reused``. With
        ``AuthConfig.refresh_reuse_grace`` all of them receive the same new refresh token, and one
        event is emitted.

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
        return await refresh.refresh(self._core, refresh_token, context, claims)

    @translates_database_errors
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
            TypeError: It is a result or a session, and not a token: a mistake that would
                otherwise end no session, silently.
        """
        return await logout.logout(self._core, token, context)

    @translates_database_errors
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
            actor: The actor of the event: ``"admin"`` if it was not the user.
            context: Circumstances of the request.

        Returns:
            How many sessions ended.
        """
        return await logout.logout_all(self._core, user, keep, actor, context)

    @translates_database_errors
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

        The current password is not asked for: use this for password resets and administrators. A
        settings page calls `change_password`.

        Args:
            user: The account.
            new_password: Checked by the policy.
            keep: A session, or its id, that goes on.
            actor: The actor of the event: ``"admin"`` if it was not the user.
            context: Circumstances of the request.

        Raises:
            PasswordPolicyError: With every rule that the password breaks.
            ValueError: The account is not saved.
        """
        await password_change.set_password(self._core, user, new_password, keep, actor, context)

    @translates_database_errors
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
        await password_change.change_password(
            self._core, self._passwords, user, current_password, new_password, keep, context
        )

    @translates_database_errors
    async def sessions(
        self, user: UserT, *, limit: int = 100, before: Session | None = None
    ) -> list[Session]:
        """Return live sessions, the one used last first; *before* is the last of the page before."""
        return await session_upkeep.list_sessions(self._core, user, limit, before)

    @translates_database_errors
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
                from a visitor, who could name another user's session.
            actor: The actor of the event: ``"admin"`` if it was not the user.
            context: Circumstances of the request.

        Returns:
            How many sessions ended: 1 or 0.
        """
        return await logout.revoke_session(self._core, session_id, user, actor, context)

    @translates_database_errors
    async def deactivate(
        self, user: UserT, *, actor: Actor = "admin", context: RequestContext | None = None
    ) -> Revocation:
        """Close the account: no login, no session, at once. Emits ``user_deactivated``.

        Closing a closed account changes and emits nothing.

        Args:
            user: The account.
            actor: The actor of the event: ``"user"`` if users close their own account.
            context: Circumstances of the request.
        """
        return await account_status.deactivate(self._core, user, actor, context)

    @translates_database_errors
    async def activate(
        self, user: UserT, *, actor: Actor = "admin", context: RequestContext | None = None
    ) -> None:
        """Open a closed account again. Emits ``user_activated``. No session comes back."""
        await account_status.activate(self._core, user, actor, context)

    @translates_database_errors
    async def unlock(
        self, user: UserT, *, actor: Actor = "admin", context: RequestContext | None = None
    ) -> None:
        """Unlock a password and reset its failures. Emits ``account_unlocked`` if it was locked."""
        await account_status.unlock(self._core, self._passwords, user, actor, context)

    @translates_database_errors
    async def purge_expired(self) -> int:
        """Delete sessions whose lifetime is over, and old counters; return how many sessions.

        For a cron job, outside a transaction. Rows of any user model go in short batches with
        pauses, so that requests go on: a million take minutes.
        """
        return await session_upkeep.purge_expired(self._core)

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
        return Relay(self.emitter, self.user_model, settings, clock=self._core.clock)
