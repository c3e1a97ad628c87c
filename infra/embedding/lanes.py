"""Blocking embedding calls run in threads, questions apart from passages."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from infra.embedding.port import Matrix, Vector

_QUESTIONS: Final = 4
"""Questions under way for each thread that embeds passages.

A question's run is short, and its thread waits for the interpreter before and after it. With several, another one
computes meanwhile, and those that end together are searched for together: 263 new answers/s instead of 244, 64 at a
time (medians of three runs each, in turns, on two cores).
"""


class Lanes:
    """Two thread pools around one blocking function, so that a question never queues behind passages.

    While both lanes are full they share the cores evenly; a question then takes longer, but starts at once.

    Args:
        embed: turns one text into one vector; called from many threads at a time.
        dimension: length of the vectors.
        threads: calls at a time in the lane of passages; in that of questions there are more, see ``_QUESTIONS``.
    """

    def __init__(self, embed: Callable[[str], Vector], *, dimension: int, threads: int) -> None:
        self._embed = embed
        self._dimension = dimension
        self._passages = ThreadPoolExecutor(threads, thread_name_prefix="embed-passages")
        self._queries = ThreadPoolExecutor(_QUESTIONS * threads, thread_name_prefix="embed-query")

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
