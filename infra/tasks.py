"""How tasks are ended."""

import asyncio
from typing import Any, Final

_AGAIN_S: Final = 5.0
"""Longer than a task takes to leave what it has begun in order."""


async def ended(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks, and again where that is lost, until each has ended. What they raised is theirs to tell.

    Python 3.11's ``wait_for``, with which redis-py sends, swallows a cancellation that comes just as it ends; a loop
    around it would go on for ever.
    """
    while going := [task for task in tasks if not task.done()]:
        for task in going:
            task.cancel()
        await asyncio.wait(going, timeout=_AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)
