"""One producer, any number of readers, each of whom gets everything from the first item on."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Generic, TypeVar

from infra.tasks import ended

T = TypeVar("T")


class Broadcast(Generic[T]):
    """Runs a generator once for all who want what it makes.

    With its last reader the work ends too: nobody pays for an answer that nobody reads.

    Args:
        source: what makes the items; closed when nobody reads any more.
        forget: called when no reader may join any more: the source has ended, or was ended.
        abandoned: called where the last reader left before the end.
    """

    def __init__(
        self, source: AsyncGenerator[T, None], *, forget: Callable[[], None], abandoned: Callable[[], None]
    ) -> None:
        self._source = source
        self._forget = forget
        self._abandoned = abandoned
        self._items: list[T] = []
        self._error: Exception | None = None
        self._has_ended = False
        self._news = asyncio.Event()
        self._readers = 0
        self._task = asyncio.create_task(self._run(), name="broadcast")

    async def read(self, *, idle_s: float | None = None) -> AsyncGenerator[T | None, None]:
        """Every item; None whenever nothing has come for ``idle_s``. Ends as the source does, with its error too."""
        self._readers += 1
        place = 0
        try:
            while True:
                while place < len(self._items):
                    yield self._items[place]
                    place += 1
                if self._has_ended:
                    break
                news = self._news
                try:
                    async with asyncio.timeout(idle_s):
                        await news.wait()
                except TimeoutError:
                    yield None
        finally:
            self._readers -= 1
            if not self._readers and not self._has_ended:
                self._forget()
                self._abandoned()
                self._task.cancel()
        if self._error is not None:
            raise self._error

    async def close(self) -> None:
        """End the work, whoever reads."""
        await ended(self._task)

    async def _run(self) -> None:
        try:
            async for item in self._source:
                self._items.append(item)
                self._tell()
        except Exception as error:  # noqa: BLE001 - every reader raises it
            self._error = error
        finally:
            self._has_ended = True
            self._forget()
            self._tell()
            await self._source.aclose()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
