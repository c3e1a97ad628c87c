"""Many documents share one model: their calls are put together, in turns, and equal texts are embedded once."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from typing_extensions import override

from infra.embedding.port import Embedder, EmbeddingError, EmbeddingThrottled, Matrix, ModelInfo
from infra.embedding.round_robin import RoundRobinQueue
from schemas.search import Vector

GOES: Final = 2
"""At a time, so that the tail of one does not leave the model idle."""

CALLS: Final = 64
"""Calls that may have texts waiting; more wait at the door."""


@dataclass(slots=True)
class _Job:
    """One distinct text: its vector to be, and how many calls still want it."""

    vector: asyncio.Future[Vector] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    callers: int = 0
    started: bool = False


class BatchingEmbedder(Embedder):
    """Puts concurrent ``embed_passages`` calls together and hands them to ``inner`` in bounded goes.

    There is no timer: an idle model starts at once with what is there, and what comes meanwhile makes the next go.
    A text that fails is tried again alone, so that only the calls that want it fail. A cancelled call takes back what
    has not begun, unless another call wants it as well. Questions pass straight through.

    Args:
        inner: the model; closed together with this.
        texts_per_go: most texts of one call of ``inner``; what comes now waits for the goes under way.
        goes: most calls of ``inner`` at a time.
        calls: most calls whose texts may wait; more wait at the door, in order.
    """

    def __init__(
        self,
        inner: Embedder,
        *,
        texts_per_go: int,
        goes: int = GOES,
        calls: int = CALLS,
    ) -> None:
        self._inner = inner
        self._texts_per_go = texts_per_go
        self._goes = goes
        self._door = asyncio.Semaphore(calls)
        self._jobs: dict[str, _Job] = {}
        self._turns = RoundRobinQueue()
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
        async with self._door:
            vectors = await self._embed(tuple(dict.fromkeys(texts)))
        return np.stack([vectors[text] for text in texts])

    @override
    async def close(self) -> None:
        """Stop what is under way, fail what waits, and close ``inner``."""
        self._closed = True
        for go in self._running:
            go.cancel()
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
        self._turns.add(text for text, job in jobs.items() if not job.started)
        self._start_goes()
        try:
            # Not gather: cancelling this call must not cancel vectors that other calls wait for.
            done, _ = await asyncio.wait([job.vector for job in jobs.values()], return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for job in jobs.values():
                job.callers -= 1
        for error in [vector.exception() for vector in done]:
            if error:
                raise error
        return {text: job.vector.result() for text, job in jobs.items()}

    def _start_goes(self) -> None:
        while len(self._running) < self._goes and (texts := self._turns.take(self._texts_per_go, self._is_wanted)):
            for text in texts:
                self._jobs[text].started = True
            go = asyncio.create_task(self._go(texts))
            self._running.add(go)
            go.add_done_callback(self._end_go)

    def _end_go(self, go: asyncio.Task[None]) -> None:
        self._running.discard(go)
        if not self._closed:
            self._start_goes()

    def _is_wanted(self, text: str) -> bool:
        job = self._jobs.get(text)
        if job is None or job.started:
            return False
        if not job.callers:
            del self._jobs[text]
            return False
        return True

    async def _go(self, texts: Sequence[str]) -> None:
        try:
            vectors = await self._inner.embed_passages(texts)
        except EmbeddingThrottled as error:  # trying each alone would only make it worse
            for text in texts:
                self._fail(text, error)
        except Exception as error:  # noqa: BLE001 - handed to the calls that asked for this text
            if len(texts) == 1:
                self._fail(texts[0], error)
            else:
                for text in texts:
                    await self._go([text])
        else:
            for text, vector in zip(texts, vectors, strict=True):
                self._jobs.pop(text).vector.set_result(vector)

    def _fail(self, text: str, error: Exception) -> None:
        vector = self._jobs.pop(text).vector
        vector.set_exception(error)
        vector.exception()  # marks it as seen: by now nobody may be left to be told
