"""Concurrent calls of one thing each, made as fewer calls of many things each."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


async def gathered(asked: Sequence[Awaitable[A]]) -> list[A]:
    """All answers; the first failure is raised, after none is waited for any more."""
    if len(asked) == 1:
        return [await asked[0]]
    return await asyncio.gather(*asked)


class Coalescer(Generic[Q, A]):
    """Puts together what is asked at the same time.

    There is no timer: who asks while nothing is under way is served in this turn of the loop; what comes while as many
    calls as allowed are under way makes the next one. Alone, nobody waits for company.

    Args:
        call: answers many in their order; an exception in place of an answer is raised to whoever asked for it.
        at_a_time: calls under way.
        most: things of one call.
    """

    def __init__(
        self, call: Callable[[Sequence[Q]], Awaitable[Sequence[A | Exception]]], *, at_a_time: int, most: int
    ) -> None:
        self._call = call
        self._at_a_time = at_a_time
        self._most = most
        self._waiting: deque[tuple[Q, asyncio.Future[A]]] = deque()
        self._calls: set[asyncio.Task[None]] = set()
        self._begins = False

    async def ask(self, one: Q) -> A:
        """The answer to one thing; raises what the call raised, or what stands in place of the answer."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[A] = loop.create_future()
        self._waiting.append((one, answer))
        if not self._begins:
            self._begins = True
            loop.call_soon(self._begin)
        return await answer

    def _begin(self) -> None:
        self._begins = False
        while self._waiting and len(self._calls) < self._at_a_time:
            asked: list[tuple[Q, asyncio.Future[A]]] = []
            while self._waiting and len(asked) < self._most:
                one, answer = self._waiting.popleft()
                if not answer.done():  # whoever has gone away is not asked for
                    asked.append((one, answer))
            if asked:
                call = asyncio.create_task(self._answer(asked))
                self._calls.add(call)
                call.add_done_callback(self._end)

    def _end(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        if self._waiting:
            self._begin()

    async def _answer(self, asked: Sequence[tuple[Q, asyncio.Future[A]]]) -> None:
        try:
            found: Sequence[A | Exception] = await self._call([one for one, _ in asked])
        except asyncio.CancelledError:
            for _, answer in asked:
                answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - handed to those who asked
            found = [error] * len(asked)
        for (_, answer), one in zip(asked, found, strict=True):
            if answer.done():
                continue
            if isinstance(one, Exception):
                answer.set_exception(one)
            else:
                answer.set_result(one)
