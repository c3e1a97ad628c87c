"""Cancellation of tasks."""

import asyncio
from typing import Any, Final

_RETRY_S: Final = 5.0
"""Time after which a task that is still running is cancelled again. Longer than any clean-up takes."""


async def cancel_and_wait(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks until each has ended. Their exceptions are ignored.

    Repeats the cancellation, because ``wait_for`` of Python 3.11, with which redis-py sends, swallows a cancellation
    that arrives just as it ends; a loop around it would never end.
    """
    while running := [task for task in tasks if not task.done()]:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=_RETRY_S)
    await asyncio.gather(*tasks, return_exceptions=True)
