"""What may go wrong in a simulated history, and where."""

import asyncio
import random
from collections.abc import Callable
from contextvars import ContextVar
from enum import StrEnum
from typing import Protocol


class Fault(StrEnum):
    """Kinds of faults; a history has some of them."""

    DELAY = "delay"
    STORE_ERROR = "store-error"
    LOST_REPLY = "lost-reply"
    FORGOTTEN = "forgotten"
    THROTTLE = "throttle"
    CRASH = "crash"
    ZOMBIE = "zombie"
    REDELIVERY = "redelivery"
    DUPLICATE = "duplicate"
    FAILURE = "failure"
    REFUSAL = "refusal"
    LOST_MANIFEST = "lost-manifest"


class Mortal(Protocol):
    """A worker process."""

    dead: bool

    def die(self) -> None:
        """Stop at once, wherever each of its tasks is."""
        ...


RUNNING: ContextVar[Mortal | None] = ContextVar("RUNNING", default=None)
"""The worker whose code runs; None outside of workers."""


class Faults:
    """Asked before and after every effect on a store, so a crash or an error can come between any two of them.

    Nothing happens any more once it is calm.
    """

    def __init__(self, rng: random.Random, kinds: frozenset[Fault]) -> None:
        self.rng = rng
        self.kinds = kinds
        self.calm = False

    def happens(self, kind: Fault, chance: float) -> bool:
        """Whether this fault strikes here."""
        return not self.calm and kind in self.kinds and self.rng.random() < chance

    async def before(self, error: Callable[[str], Exception] | None = None) -> None:
        """A request is on its way; with ``error`` it may be refused, or throttled, before it has an effect."""
        await self._pause()
        if error and self.happens(Fault.STORE_ERROR, 0.03):
            raise error("not taken")
        if error and self.happens(Fault.THROTTLE, 0.03):
            raise error("429: later")

    async def after(self, error: Callable[[str], Exception] | None = None) -> None:
        """A reply is on its way; with ``error`` it may get lost, although the request had its effect."""
        await self._pause()
        if error and self.happens(Fault.LOST_REPLY, 0.03):
            raise error("taken, but nobody heard")

    async def _pause(self) -> None:
        await asyncio.sleep(self.rng.choice((0, 0, 0, self.rng.expovariate(20))))
        if self.happens(Fault.DELAY, 0.02):
            await asyncio.sleep(self.rng.uniform(1, 10))  # a stopped process, or a request long on its way
        worker = RUNNING.get()
        if worker is not None and (worker.dead or self.happens(Fault.CRASH, 0.01)):
            worker.die()
            raise asyncio.CancelledError
