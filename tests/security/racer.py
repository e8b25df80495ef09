"""A process of the host: makes the calls that a test orders, and stops before its writes.

One JSON object a line. An order names a call and where to stop; at each stop the racer reports where it
is and waits for the order to go on; in the end it reports the outcome of the call, the events that were
emitted, and how many hashes were computed.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tortoise.context import TortoiseContext

from tests.support.app import User
from tests.support.database import root, transaction_class
from tests.support.hashing import Cost, argon2_costs
from tortoise_auth import (
    AbstractUser,
    AuthConfig,
    AuthResult,
    AuthService,
    EventEmitter,
    RequestContext,
    Revocation,
    TortoiseAuthError,
)
from tortoise_auth.flows import password_check
from tortoise_auth.testing import FakeClock, capture, cheap_hasher
from tortoise_auth.throttling import Backoff, DatabaseThrottle

Order = dict[str, Any]

password_check._PATIENCE = 60.0  # a call may wait as long as a test lets it


@dataclass
class Wire:
    """Standard input and output."""

    reader: asyncio.StreamReader

    @classmethod
    async def opened(cls) -> Wire:
        """Return the wire to the process that started this one."""
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        return cls(reader)

    async def receive(self) -> Order:
        """Return the next order, or an empty one after the last."""
        line = await self.reader.readline()
        order: Order = json.loads(line) if line else {}
        return order

    def say(self, **facts: object) -> None:
        """Answer."""
        print(json.dumps(facts), flush=True)


@dataclass
class Racer:
    """Makes calls on one database."""

    wire: Wire
    auth: AuthService[User]
    hashes: list[Cost]
    stops: set[str] = field(default_factory=set)

    async def stop_at(self, place: str) -> None:
        """Wait for the order to go on, the first time that a call reaches *place*."""
        if place in self.stops:
            self.stops.remove(place)
            self.wire.say(at=place, hashes=len(self.hashes))
            await self.wire.receive()

    async def carry_out(self, order: Order) -> None:
        """Make a call, ``times`` times at once, and report its outcomes."""
        self.hashes.clear()
        self.stops = set(order["stops"])
        user = await User.get_or_none(pk=order.get("user"))
        calls = [self._call(order, user, number) for number in range(order["times"])]
        with capture(self.auth.emitter) as events:
            outcomes = await asyncio.gather(*(outcome(call) for call in calls))
        self.wire.say(
            outcomes=outcomes,
            events=[event.to_dict() for event in events],
            hashes=len(self.hashes),
        )

    def _call(self, order: Order, user: Any, number: int) -> Callable[[], Awaitable[object]]:
        auth, password, token = self.auth, order.get("password", ""), order.get("token", "")
        context = RequestContext(ip=order.get("ip"))
        identifier = order.get("identifier", "").format(number)
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "refresh": lambda: auth.refresh(token),
            "logout": lambda: auth.logout(token),
            "logout_all": lambda: auth.logout_all(user),
            "set_password": lambda: auth.set_password(user, password),
            "deactivate": lambda: auth.deactivate(user),
            "login": lambda: auth.login(identifier, password, context=context),
            "check_password": lambda: user.check_password(password),
        }
        return calls[order["call"]]


async def outcome(call: Callable[[], Awaitable[object]]) -> dict[str, object]:
    """Return what *call* returns or raises, as plain values."""
    try:
        result = await call()
    except TortoiseAuthError as error:
        return {"error": type(error).__name__}
    if isinstance(result, AuthResult):
        return {"access": result.access_token, "refresh": result.refresh_token}
    return {"ended": result.sessions} if isinstance(result, Revocation) else {"result": result}


async def race_on(wire: Wire, order: Order, hashes: list[Cost]) -> Order:
    """Carry out orders on one database; return the first that is for another one."""
    clock, emitter = FakeClock(), EventEmitter()
    AbstractUser.emitter, AbstractUser.password_hasher = emitter, cheap_hasher()
    throttle = DatabaseThrottle(
        account=Backoff(free_attempts=5), source=Backoff(free_attempts=5), clock=clock
    )
    auth = AuthService(User, AuthConfig(secret=order["secret"]), throttle=throttle, clock=clock)
    racer = Racer(wire, auth, hashes)
    async with TortoiseContext() as context:
        await context.init(config=order["database"])
        await User.all().count()  # connected
        with stopping(racer, transaction_class(root(context))):
            wire.say(ready=True)
            while "call" in (order := await wire.receive()):
                await racer.carry_out(order)
    return order


@contextmanager
def stopping(racer: Racer, wrapper: Any) -> Iterator[None]:
    """Let transactions stop where the racer is ordered to."""
    begin, commit = wrapper.begin, wrapper.commit

    async def begin_when_ordered(self: object) -> None:
        await racer.stop_at("begin")
        await begin(self)

    async def commit_when_ordered(self: object) -> None:
        await racer.stop_at("commit")
        await commit(self)

    wrapper.begin, wrapper.commit = begin_when_ordered, commit_when_ordered
    try:
        yield
    finally:
        wrapper.begin, wrapper.commit = begin, commit


async def main() -> None:
    """Race until the orders end."""
    wire = await Wire.opened()
    order = await wire.receive()
    with argon2_costs() as hashes:
        while order:
            order = await race_on(wire, order, hashes)


if __name__ == "__main__":
    asyncio.run(main())
