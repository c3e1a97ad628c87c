"""Request deadlines, propagated to everything that works for the request."""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

_deadline_s: ContextVar[float] = ContextVar("deadline_s", default=math.inf)
"""Deadline on the monotonic clock."""


class DeadlineExceeded(Exception):
    """The request did not complete within its deadline."""


@asynccontextmanager
async def deadline_in(seconds: float) -> AsyncIterator[None]:
    """Cancel the body after ``seconds``. Tasks created in it inherit the deadline.

    Raises:
        DeadlineExceeded: the body did not complete in time.
    """
    token = _deadline_s.set(min(_deadline_s.get(), time.monotonic() + seconds))
    try:
        async with asyncio.timeout(seconds) as timeout:
            yield
    except TimeoutError as error:
        if timeout.expired():
            raise DeadlineExceeded(f"not completed within {seconds:g} s") from error
        raise
    finally:
        _deadline_s.reset(token)


def remaining_s() -> float:
    """Seconds until the deadline; infinite without one."""
    return _deadline_s.get() - time.monotonic()
