"""Coalescing of concurrent calls into batches."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


async def gather_all(calls: Sequence[Awaitable[A]]) -> list[A]:
    """Results of all calls. Raises the first failure; the other calls continue."""
    if len(calls) == 1:
        return [await calls[0]]
    return await asyncio.gather(*calls)


class Coalescer(Generic[Q, A]):
    """Combines items that are submitted concurrently into batched calls.

    There is no timer. If no call is in progress, items submitted in the current turn of the event loop form a call;
    while ``max_calls`` are in progress, further items form the next call. A single item is never delayed.

    Args:
        call: returns a result for each item, in order. An exception as result is raised to the caller of that item.
        max_calls: maximum number of concurrent calls.
        max_items: maximum number of items per call.
    """

    def __init__(
        self, call: Callable[[Sequence[Q]], Awaitable[Sequence[A | Exception]]], *, max_calls: int, max_items: int
    ) -> None:
        self._call = call
        self._max_calls = max_calls
        self._max_items = max_items
        self._waiting: deque[tuple[Q, asyncio.Future[A]]] = deque()
        self._calls: set[asyncio.Task[None]] = set()
        self._is_scheduled = False

    async def submit(self, item: Q) -> A:
        """The result of one item; raises the error of the call or of this item."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[A] = loop.create_future()
        self._waiting.append((item, result))
        if not self._is_scheduled:
            self._is_scheduled = True
            loop.call_soon(self._start_calls)
        return await result

    def _start_calls(self) -> None:
        self._is_scheduled = False
        while self._waiting and len(self._calls) < self._max_calls:
            batch: list[tuple[Q, asyncio.Future[A]]] = []
            while self._waiting and len(batch) < self._max_items:
                item, result = self._waiting.popleft()
                if not result.done():  # its caller was cancelled otherwise
                    batch.append((item, result))
            if batch:
                call = asyncio.create_task(self._run(batch))
                self._calls.add(call)
                call.add_done_callback(self._on_call_done)

    def _on_call_done(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        if self._waiting:
            self._start_calls()

    async def _run(self, batch: Sequence[tuple[Q, asyncio.Future[A]]]) -> None:
        try:
            outcomes: Sequence[A | Exception] = await self._call([item for item, _ in batch])
        except asyncio.CancelledError:
            for _, result in batch:
                result.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - raised to the callers
            outcomes = [error] * len(batch)
        for (_, result), outcome in zip(batch, outcomes, strict=True):
            if result.done():
                continue
            if isinstance(outcome, Exception):
                result.set_exception(outcome)
            else:
                result.set_result(outcome)
