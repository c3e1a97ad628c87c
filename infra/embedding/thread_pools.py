"""Blocking embedding calls run in threads, questions apart from passages."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from infra.embedding.port import Matrix
from schemas.search import Vector


class EmbeddingThreadPools:
    """Two thread pools around one blocking function, so that a question never queues behind passages.

    While both lanes are full they share the cores evenly; a question then takes longer, but starts at once.

    Args:
        embed: turns one text into one vector; called from many threads at a time.
        dimension: length of the vectors.
        threads: calls at a time in each lane.
    """

    def __init__(self, embed: Callable[[str], Vector], *, dimension: int, threads: int) -> None:
        self._embed = embed
        self._dimension = dimension
        self._passages = ThreadPoolExecutor(threads, thread_name_prefix="embed-passages")
        self._queries = ThreadPoolExecutor(threads, thread_name_prefix="embed-query")

    async def passages(self, texts: Sequence[str]) -> Matrix:
        """Vectors in the order of ``texts``. After a failure, or when cancelled, what has not begun never begins."""
        if not texts:
            return np.empty((0, self._dimension), dtype=np.float32)
        runs = [self._passages.submit(self._embed, text) for text in texts]
        try:
            return np.stack(await asyncio.gather(*map(asyncio.wrap_future, runs)))
        finally:
            for run in runs:
                run.cancel()

    async def query(self, text: str) -> Vector:
        """Vector of one text, in the lane of questions."""
        return await asyncio.get_running_loop().run_in_executor(self._queries, self._embed, text)

    async def close(self) -> None:
        """Drop what has not begun and wait for what has."""
        for pool in (self._passages, self._queries):
            await asyncio.to_thread(pool.shutdown, cancel_futures=True)
