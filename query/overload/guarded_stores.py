"""The index and the generator, each behind a bulkhead."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Final, TypeVar

from typing_extensions import override

from infra.generation.port import AnswerPart, GenerationError, GenerationThrottled, Generator, SourceText, Written
from infra.opensearch.port import IndexUnavailable, SearchIndex
from query.overload.bulkhead import Bulkhead, CallRejected
from query.overload.deadline import remaining_s
from query.overload.retry_budget import RetryBudget
from query.telemetry.metrics import QueryMetrics
from schemas.documents import DocumentKey
from schemas.index import Manifest, StoredChunk
from schemas.queries import GeneratedAnswer
from schemas.search import Candidates, Hit, HybridSearch, Vector

MAX_RETRIED_CALL_S: Final = 0.5
"""Only failures within this time are retried. After a slow failure the store is likely overloaded."""

_BACKOFF_S: Final = (0.01, 0.05)
_GENERATION_QUEUE_S: Final = 1.0

_GENERATION_DEADLINE_FRACTION: Final = 0.9
"""Generation ends before the request's deadline, so that the results can still be returned without an answer."""

T = TypeVar("T")


class GuardedIndex(SearchIndex):
    """A ``SearchIndex`` with a bulkhead. Calls that fail fast are retried once, within a retry budget.

    Args:
        index: the index.
        bulkhead: bulkhead in front of it.
        metrics: counts retries.
        timeout_s: timeout of one call.
    """

    def __init__(self, index: SearchIndex, *, bulkhead: Bulkhead, metrics: QueryMetrics, timeout_s: float) -> None:
        self._index = index
        self._bulkhead = bulkhead
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._retries = RetryBudget()

    @override
    async def search(self, searches: Sequence[HybridSearch]) -> list[Candidates]:
        return await self._call(lambda: self._index.search(searches))

    @override
    async def fetch(self, hits: Sequence[Hit]) -> dict[str, StoredChunk]:
        return await self._call(lambda: self._index.fetch(hits))

    @override
    async def manifests(self, keys: Sequence[DocumentKey]) -> dict[DocumentKey, Manifest]:
        return await self._call(lambda: self._index.manifests(keys))

    @override
    async def count_chunks(self, key: DocumentKey) -> int:
        return await self._call(lambda: self._index.count_chunks(key))

    @override
    async def positions(self, tenant: str) -> dict[int, int]:
        return await self._call(lambda: self._index.positions(tenant))

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        self._retries.deposit()
        began_s = time.monotonic()
        try:
            return await self._attempt(call)
        except IndexUnavailable as error:
            failed_fast = time.monotonic() - began_s < min(MAX_RETRIED_CALL_S, remaining_s())
            if isinstance(error.__cause__, CallRejected) or not failed_fast or not self._retries.withdraw():
                raise
        self._metrics.call_retries.labels("index").inc()
        await asyncio.sleep(random.uniform(*_BACKOFF_S))  # noqa: S311 - jitter, not a secret
        return await self._attempt(call)

    async def _attempt(self, call: Callable[[], Awaitable[T]]) -> T:
        timeout_s = max(0.0, min(self._timeout_s, remaining_s()))
        try:
            async with self._bulkhead.admitted(queue_s=timeout_s, timeout_s=timeout_s):
                return await call()
        except CallRejected as error:
            raise IndexUnavailable(str(error), retry_after_s=error.retry_after_s) from error
        except TimeoutError as error:
            raise IndexUnavailable(f"the index did not respond within {timeout_s:.3g} s") from error


class GuardedGenerator(Generator):
    """A ``Generator`` with a bulkhead.

    Args:
        generator: the generator.
        bulkhead: bulkhead in front of it.
        timeout_s: timeout of one answer.
    """

    def __init__(self, generator: Generator, *, bulkhead: Bulkhead, timeout_s: float) -> None:
        self._generator = generator
        self._bulkhead = bulkhead
        self._timeout_s = timeout_s

    @property
    @override
    def name(self) -> str:
        return self._generator.name

    @override
    async def answer(
        self, question: str, sources: Sequence[SourceText], query_vector: Vector | None = None
    ) -> GeneratedAnswer:
        timeout_s = max(0.0, min(self._timeout_s, _GENERATION_DEADLINE_FRACTION * remaining_s()))
        try:
            async with self._bulkhead.admitted(queue_s=min(_GENERATION_QUEUE_S, timeout_s), timeout_s=timeout_s):
                return await self._generator.answer(question, sources, query_vector)
        except CallRejected as error:
            raise GenerationThrottled(str(error), retry_after_s=error.retry_after_s) from error
        except TimeoutError as error:
            raise GenerationError(f"no answer within {timeout_s:.3g} s") from error

    @override
    async def stream(
        self, question: str, sources: Sequence[SourceText], query_vector: Vector | None = None
    ) -> AsyncGenerator[AnswerPart | Written, None]:
        # The request's deadline does not apply: the reader has the sources already and receives the text as it arrives.
        try:
            async with (
                self._bulkhead.admitted(queue_s=_GENERATION_QUEUE_S, timeout_s=self._timeout_s),
                aclosing(self._generator.stream(question, sources, query_vector)) as parts,
            ):
                async for part in parts:
                    yield part
        except CallRejected as error:
            raise GenerationThrottled(str(error), retry_after_s=error.retry_after_s) from error
        except TimeoutError as error:
            raise GenerationError(f"no answer within {self._timeout_s:g} s") from error

    @override
    async def close(self) -> None:
        await self._generator.close()
