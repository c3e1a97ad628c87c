"""The index and the generator behind their guards."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Final, TypeVar

from infra.generation.port import AnswerPart, GenerationError, GenerationThrottled, Generator, SourceText, Written
from infra.opensearch.port import IndexUnavailable, SearchIndex
from query.overload.bulkhead import Bulkhead, NotAdmitted
from query.overload.deadline import left_s
from query.overload.retry_budget import RetryBudget
from query.telemetry.metrics import QueryMetrics
from schemas.documents import DocumentKey
from schemas.index import Manifest, StoredChunk
from schemas.queries import GeneratedAnswer
from schemas.search import Hit, HybridSearch, Vector, Windows

QUICK_S: Final = 0.5
"""A failure that took longer is not tried again: the time is gone, and the store has enough to do."""

_PAUSES_S: Final = (0.01, 0.05)
_GENERATION_QUEUE_S: Final = 1.0

T = TypeVar("T")


class GuardedIndex:
    """See ``SearchIndex``. A quick failure is tried once more, within a budget.

    Args:
        index: the index.
        guard: stands before it.
        metrics: where repetitions are counted.
        limit_s: longest call.
    """

    def __init__(self, index: SearchIndex, *, guard: Bulkhead, metrics: QueryMetrics, limit_s: float) -> None:
        self._index = index
        self._guard = guard
        self._metrics = metrics
        self._limit_s = limit_s
        self._budget = RetryBudget()

    async def search(self, searches: Sequence[HybridSearch]) -> list[Windows]:
        """See ``SearchIndex``."""
        return await self._call(lambda: self._index.search(searches))

    async def fetch(self, hits: Sequence[Hit]) -> dict[str, StoredChunk]:
        """See ``SearchIndex``."""
        return await self._call(lambda: self._index.fetch(hits))

    async def manifests(self, keys: Sequence[DocumentKey]) -> dict[DocumentKey, Manifest]:
        """See ``SearchIndex``."""
        return await self._call(lambda: self._index.manifests(keys))

    async def count_chunks(self, key: DocumentKey) -> int:
        """See ``SearchIndex``."""
        return await self._call(lambda: self._index.count_chunks(key))

    async def positions(self, tenant: str) -> dict[int, int]:
        """See ``SearchIndex``."""
        return await self._call(lambda: self._index.positions(tenant))

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        self._budget.note_call()
        began_s = time.monotonic()
        try:
            return await self._once(call)
        except IndexUnavailable as error:
            is_quick = time.monotonic() - began_s < min(QUICK_S, left_s())
            if isinstance(error.__cause__, NotAdmitted) or not is_quick or not self._budget.take():
                raise
        self._metrics.retries.labels("index").inc()
        await asyncio.sleep(random.uniform(*_PAUSES_S))  # noqa: S311 - spreads load, guards nothing
        return await self._once(call)

    async def _once(self, call: Callable[[], Awaitable[T]]) -> T:
        limit_s = max(0.0, min(self._limit_s, left_s()))
        try:
            async with self._guard.admitted(queue_s=limit_s, limit_s=limit_s):
                return await call()
        except NotAdmitted as error:
            raise IndexUnavailable(str(error), retry_after_s=error.retry_after_s) from error
        except TimeoutError as error:
            raise IndexUnavailable(f"the index did not answer within {limit_s:.3g} s") from error


class GuardedGenerator:
    """See ``Generator``.

    Args:
        generator: the generator.
        guard: stands before it.
        limit_s: longest time for one answer.
    """

    def __init__(self, generator: Generator, *, guard: Bulkhead, limit_s: float) -> None:
        self._generator = generator
        self._guard = guard
        self._limit_s = limit_s
        self.name = generator.name

    async def answer(
        self, question: str, sources: Sequence[SourceText], query_vector: Vector | None = None
    ) -> GeneratedAnswer:
        """See ``Generator``. Ends a little before the request does: the results are to go out without an answer."""
        limit_s = max(0.0, min(self._limit_s, 0.9 * left_s()))
        try:
            async with self._guard.admitted(queue_s=min(_GENERATION_QUEUE_S, limit_s), limit_s=limit_s):
                return await self._generator.answer(question, sources, query_vector)
        except NotAdmitted as error:
            raise GenerationThrottled(str(error), retry_after_s=error.retry_after_s) from error
        except TimeoutError as error:
            raise GenerationError(f"no answer within {limit_s:.3g} s") from error

    async def stream(
        self, question: str, sources: Sequence[SourceText], query_vector: Vector | None = None
    ) -> AsyncGenerator[AnswerPart | Written, None]:
        """See ``Generator``. The request's deadline does not count: its reader has the sources, and sees it come."""
        try:
            async with (
                self._guard.admitted(queue_s=_GENERATION_QUEUE_S, limit_s=self._limit_s),
                aclosing(self._generator.stream(question, sources, query_vector)) as parts,
            ):
                async for part in parts:
                    yield part
        except NotAdmitted as error:
            raise GenerationThrottled(str(error), retry_after_s=error.retry_after_s) from error
        except TimeoutError as error:
            raise GenerationError(f"no answer within {self._limit_s:g} s") from error

    async def close(self) -> None:
        """See ``Generator``."""
        await self._generator.close()
