"""Until when an answer is wanted: set once for each request, and asked by whatever works for it."""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

_until_s: ContextVar[float] = ContextVar("until_s", default=math.inf)


class DeadlineExceeded(Exception):
    """The time that the request had is over."""


@asynccontextmanager
async def deadline_in(seconds: float) -> AsyncIterator[None]:
    """End what runs here after ``seconds``; tasks that are begun in it know of its deadline.

    Raises:
        DeadlineExceeded: it did not end by itself.
    """
    token = _until_s.set(min(_until_s.get(), time.monotonic() + seconds))
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError as error:
        if limit.expired():
            raise DeadlineExceeded(f"not done within {seconds:g} s") from error
        raise
    finally:
        _until_s.reset(token)


def left_s() -> float:
    """Seconds until the deadline; infinite where there is none."""
    return _until_s.get() - time.monotonic()
