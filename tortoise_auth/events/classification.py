"""What kind of thing an event class names, in words from which every standard format derives."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from tortoise_auth.legible import quoted

FailureReason: TypeAlias = Literal["not_found", "inactive", "bad_password", "throttled", "locked"]
Activity: TypeAlias = Literal[
    "logon",
    "logoff",
    "session.refresh",
    "session.revoke",
    "token.reuse",
    "password.change",
    "password.reset",
    "password.rehash",
    "account.create",
    "account.update",
    "account.enable",
    "account.disable",
    "account.lock",
    "account.unlock",
    "account.delete",
    "factor.enable",
    "factor.disable",
    "resource.create",
    "resource.read",
    "resource.update",
    "resource.delete",
    "resource.search",
    "resource.import",
    "resource.export",
    "resource.share",
]
"""What was done: to a session, a password, an account, a second factor, or a thing of the host's."""

Outcome: TypeAlias = Literal["success", "failure"]
Severity: TypeAlias = Literal["informational", "low", "medium", "high", "critical"]
Signal: TypeAlias = Literal[
    "session-established",
    "session-revoked",
    "credential-change",
    "account-enabled",
    "account-disabled",
    "account-purged",
]
"""The event types of CAEP 1.0 and RISC 1.0 that a Security Event Token can carry."""

_WORDS = {
    "activity": get_args(Activity),
    "outcome": get_args(Outcome),
    "severity": get_args(Severity),
    "reason": (None, *get_args(FailureReason)),
    "signal": (None, *get_args(Signal)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Classification:
    """What kind of thing an event class names. OCSF, ECS and Security Event Tokens derive from it.

    Example::

        @dataclass(frozen=True, kw_only=True)
        class InvoiceExported(Event):
            classification = Classification(
                activity="resource.export",
                message="An invoice was exported",
                resource="invoice",
                resource_id="invoice_id",
            )

            invoice_id: int

    Attributes:
        activity: What was done.
        message: One English sentence without a full stop. Warning: it is sent as it is.
        outcome: Whether it succeeded; what was refused is a failure.
        severity: ``"high"`` and ``"critical"`` are alerts in ECS.
        reason: Why it was refused, unless the event has a field ``reason`` that says so.
        signal: The CAEP or RISC event type of its Security Event Token; ``None`` if it has none.
            Warning: receivers end sessions and close accounts because of one.
        resource: What kind of thing a ``resource`` activity was done to.
        resource_id: The field of the event that holds the id of that thing.
    """

    activity: Activity
    message: str
    outcome: Outcome = "success"
    severity: Severity = "informational"
    reason: FailureReason | None = None
    signal: Signal | None = None
    resource: str | None = None
    resource_id: str | None = None

    def problem(self, fields: Collection[str]) -> str | None:
        """Return what is wrong with it in an event with these *fields*; ``None`` if nothing is."""
        for name, allowed in _WORDS.items():
            if (word := getattr(self, name)) not in allowed:
                return f"{name} is {quoted(word)}; allowed are {', '.join(map(repr, allowed))}"
        if not isinstance(self.message, str) or not self.message.strip():
            return f"message is {quoted(self.message)}; it must be a sentence"
        if self.resource is not None and not isinstance(self.resource, str):
            return f"resource is {quoted(self.resource)}; it must be text, such as 'invoice'"
        if self.activity.startswith("resource.") != bool(self.resource):
            return f"resource is {quoted(self.resource)}; it goes with the 'resource.' activities alone"
        if self.resource_id is not None and self.resource_id not in fields:
            return (
                f"resource_id is {quoted(self.resource_id)}; fields are {', '.join(sorted(fields))}"
            )
        if self.signal == "credential-change" and not self.activity.startswith("password."):
            return f"signal is {quoted(self.signal)}, which goes with the activities of a password alone"
        return None
