"""Thread pools for blocking embedding calls, separate for questions and passages."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from infra.embedding.port import Matrix
from schemas.search import Vector


class EmbeddingThreadPools:
    """Two thread pools for one blocking function, so that a question is never queued behind passages.

    If both pools are busy, they share the cores evenly: a question takes longer, but starts immediately.

    Args:
        embed: embeds one text; called from many threads concurrently.
        dimension: length of the vectors.
        threads: threads of each pool.
    """

    def __init__(self, embed: Callable[[str], Vector], *, dimension: int, threads: int) -> None:
        self._embed = embed
        self._dimension = dimension
        self._passages = ThreadPoolExecutor(threads, thread_name_prefix="embed-passages")
        self._queries = ThreadPoolExecutor(threads, thread_name_prefix="embed-query")

    async def passages(self, texts: Sequence[str]) -> Matrix:
        """Vectors in the order of ``texts``. After a failure or cancellation, pending texts are not embedded."""
        if not texts:
            return np.empty((0, self._dimension), dtype=np.float32)
        runs = [self._passages.submit(self._embed, text) for text in texts]
        try:
            return np.stack(await asyncio.gather(*map(asyncio.wrap_future, runs)))
        finally:
            for run in runs:
                run.cancel()

    async def query(self, text: str) -> Vector:
        """Vector of a question."""
        return await asyncio.get_running_loop().run_in_executor(self._queries, self._embed, text)

    async def close(self) -> None:
        """Cancel pending calls and wait for running ones."""
        for pool in (self._passages, self._queries):
            await asyncio.to_thread(pool.shutdown, cancel_futures=True)
