"""How the query service ends what it does in the background."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from query import main
from query.main import _in_background


async def test_what_takes_no_notice_of_the_first_cancellation_is_ended_all_the_same(monkeypatch):
    monkeypatch.setattr(main, "_CANCELLED_AGAIN_S", 0.01)
    begun, cancelled = asyncio.Event(), 0

    async def deaf():
        nonlocal cancelled
        while True:
            try:
                begun.set()
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled += 1
                if cancelled > 1:
                    raise

    async with asyncio.timeout(10), AsyncExitStack() as ending:
        _in_background(ending, deaf(), "deaf")
        await begun.wait()
    assert cancelled == 2


async def test_what_failed_in_the_background_is_said_at_the_end():
    async def failing():
        raise LookupError("lost")

    ending = AsyncExitStack()
    _in_background(ending, failing(), "failing")
    await asyncio.sleep(0)
    with pytest.raises(LookupError, match="lost"):
        await ending.aclose()
