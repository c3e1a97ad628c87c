"""Batching of concurrent embedding calls, round-robin and with deduplication of equal texts."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from typing_extensions import override

from infra.embedding.port import Embedder, EmbeddingError, EmbeddingThrottled, Matrix, ModelInfo
from infra.embedding.round_robin import RoundRobinQueue
from schemas.search import Vector

CONCURRENT_BATCHES: Final = 2
"""So that the model is not idle at the end of a batch."""

MAX_CALLS: Final = 64
"""Calls whose texts may be queued. Further calls wait."""


@dataclass(slots=True)
class _Job:
    """A distinct text: its future vector, and the number of calls that wait for it."""

    vector: asyncio.Future[Vector] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    callers: int = 0
    started: bool = False


class BatchingEmbedder(Embedder):
    """Combines concurrent ``embed_passages`` calls into batches.

    There is no timer: if the model is idle, a batch starts immediately; texts that arrive meanwhile form the next one.
    If a batch fails, its texts are retried one by one, so that only the calls with the failing text fail. The texts of
    a cancelled call are dropped unless they are being embedded or another call needs them. Questions are not batched.

    Args:
        inner: the model; closed with this embedder.
        batch_size: maximum number of texts per call of ``inner``.
        batches: maximum number of concurrent calls of ``inner``.
        max_calls: maximum number of calls whose texts are queued; further calls wait in order.
    """

    def __init__(
        self,
        inner: Embedder,
        *,
        batch_size: int,
        batches: int = CONCURRENT_BATCHES,
        max_calls: int = MAX_CALLS,
    ) -> None:
        self._inner = inner
        self._batch_size = batch_size
        self._max_batches = batches
        self._admission = asyncio.Semaphore(max_calls)
        self._jobs: dict[str, _Job] = {}
        self._queue = RoundRobinQueue()
        self._running: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    @override
    def model(self) -> ModelInfo:
        return self._inner.model

    @override
    async def embed_query(self, text: str) -> Vector:
        return await self._inner.embed_query(text)

    @override
    async def embed_passages(self, texts: Sequence[str]) -> Matrix:
        if not texts:
            return np.empty((0, self.model.dimension), dtype=np.float32)
        async with self._admission:
            vectors = await self._embed(tuple(dict.fromkeys(texts)))
        return np.stack([vectors[text] for text in texts])

    @override
    async def close(self) -> None:
        self._closed = True
        for batch in self._running:
            batch.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        for text in tuple(self._jobs):
            self._fail(text, EmbeddingError("the embedder was closed"))
        await self._inner.close()

    async def _embed(self, texts: Sequence[str]) -> dict[str, Vector]:
        if self._closed:
            raise EmbeddingError("the embedder was closed")
        jobs = {text: self._jobs.setdefault(text, _Job()) for text in texts}
        for job in jobs.values():
            job.callers += 1
        self._queue.add(text for text, job in jobs.items() if not job.started)
        self._start_batches()
        try:
            # Not gather: the cancellation of this call must not cancel vectors that other calls wait for.
            done, _ = await asyncio.wait([job.vector for job in jobs.values()], return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for job in jobs.values():
                job.callers -= 1
        for error in [vector.exception() for vector in done]:
            if error:
                raise error
        return {text: job.vector.result() for text, job in jobs.items()}

    def _start_batches(self) -> None:
        while len(self._running) < self._max_batches and (texts := self._queue.take(self._batch_size, self._is_wanted)):
            for text in texts:
                self._jobs[text].started = True
            batch = asyncio.create_task(self._embed_batch(texts))
            self._running.add(batch)
            batch.add_done_callback(self._on_batch_done)

    def _on_batch_done(self, batch: asyncio.Task[None]) -> None:
        self._running.discard(batch)
        if not self._closed:
            self._start_batches()

    def _is_wanted(self, text: str) -> bool:
        job = self._jobs.get(text)
        if job is None or job.started:
            return False
        if not job.callers:
            del self._jobs[text]
            return False
        return True

    async def _embed_batch(self, texts: Sequence[str]) -> None:
        try:
            vectors = await self._inner.embed_passages(texts)
        except EmbeddingThrottled as error:  # single retries would only add load
            for text in texts:
                self._fail(text, error)
        except Exception as error:  # noqa: BLE001 - raised to the calls with this text
            if len(texts) == 1:
                self._fail(texts[0], error)
            else:
                for text in texts:
                    await self._embed_batch([text])
        else:
            for text, vector in zip(texts, vectors, strict=True):
                self._jobs.pop(text).vector.set_result(vector)

    def _fail(self, text: str, error: Exception) -> None:
        vector = self._jobs.pop(text).vector
        vector.set_exception(error)
        vector.exception()  # marks it as retrieved: all calls may have been cancelled
