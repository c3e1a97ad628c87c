"""Broadcast of one producer to any number of readers."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Generic, TypeVar

from infra.tasks import cancel_and_wait

T = TypeVar("T")


class Broadcast(Generic[T]):
    """Runs a generator once; every reader receives all its items, from the first one on.

    The generator is cancelled when the last reader leaves before the end.

    Args:
        source: producer of the items. Closed at the end or on cancellation.
        on_closed: called when no further reader may join: the source has ended or is cancelled.
        on_abandoned: called when the last reader leaves before the end.
    """

    def __init__(
        self, source: AsyncGenerator[T, None], *, on_closed: Callable[[], None], on_abandoned: Callable[[], None]
    ) -> None:
        self._source = source
        self._on_closed = on_closed
        self._on_abandoned = on_abandoned
        self._items: list[T] = []
        self._error: Exception | None = None
        self._has_ended = False
        self._changed = asyncio.Event()
        self._readers = 0
        self._task = asyncio.create_task(self._run(), name="broadcast")

    async def read(self, *, idle_s: float | None = None) -> AsyncGenerator[T | None, None]:
        """Every item; None after each ``idle_s`` without an item. Ends or raises as the source does."""
        self._readers += 1
        offset = 0
        try:
            while True:
                while offset < len(self._items):
                    yield self._items[offset]
                    offset += 1
                if self._has_ended:
                    break
                changed = self._changed
                try:
                    async with asyncio.timeout(idle_s):
                        await changed.wait()
                except TimeoutError:
                    yield None
        finally:
            self._readers -= 1
            if not self._readers and not self._has_ended:
                self._on_closed()
                self._on_abandoned()
                self._task.cancel()
        if self._error is not None:
            raise self._error

    async def close(self) -> None:
        """Cancel the source, even while it is being read."""
        await cancel_and_wait(self._task)

    async def _run(self) -> None:
        try:
            async for item in self._source:
                self._items.append(item)
                self._wake()
        except Exception as error:  # noqa: BLE001 - raised to every reader
            self._error = error
        finally:
            self._has_ended = True
            self._on_closed()
            self._wake()
            await self._source.aclose()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
