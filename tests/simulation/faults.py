"""Faults of a simulated history, and the points at which they occur."""

import asyncio
import random
from collections.abc import Callable
from contextvars import ContextVar
from enum import StrEnum
from typing import Protocol


class Fault(StrEnum):
    """Kinds of faults. A history has a subset of them."""

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
        """Stop immediately, at the current await of each task."""
        ...


RUNNING: ContextVar[Mortal | None] = ContextVar("RUNNING", default=None)
"""The worker whose code is running; None outside of workers."""


class Faults:
    """Called before and after every effect on a store, so that a crash or an error may occur between any two effects.

    While ``calm`` is set, no fault occurs.
    """

    def __init__(self, rng: random.Random, kinds: frozenset[Fault]) -> None:
        self.rng = rng
        self.kinds = kinds
        self.calm = False

    def happens(self, kind: Fault, chance: float) -> bool:
        """Whether the fault occurs at this point."""
        return not self.calm and kind in self.kinds and self.rng.random() < chance

    async def before(self, error: Callable[[str], Exception] | None = None) -> None:
        """A request is in flight. With ``error`` it may be rejected or throttled before it has an effect."""
        await self._pause()
        if error and self.happens(Fault.STORE_ERROR, 0.03):
            raise error("not taken")
        if error and self.happens(Fault.THROTTLE, 0.03):
            raise error("429: later")

    async def after(self, error: Callable[[str], Exception] | None = None) -> None:
        """A response is in flight. With ``error`` it may be lost, although the request had its effect."""
        await self._pause()
        if error and self.happens(Fault.LOST_REPLY, 0.03):
            raise error("taken, but nobody heard")

    async def _pause(self) -> None:
        await asyncio.sleep(self.rng.choice((0, 0, 0, self.rng.expovariate(20))))
        if self.happens(Fault.DELAY, 0.02):
            await asyncio.sleep(self.rng.uniform(1, 10))  # a suspended process, or a slow request
        worker = RUNNING.get()
        if worker is not None and (worker.dead or self.happens(Fault.CRASH, 0.01)):
            worker.die()
            raise asyncio.CancelledError
