"""Threads behind an embedder: what a failure leaves undone."""

from threading import Event

import numpy as np
import pytest

from infra.embedding.port import EmbeddingError
from infra.embedding.thread_pools import EmbeddingThreadPools
from schemas.search import Vector


async def test_after_a_failure_what_has_not_begun_never_begins():
    begun: list[str] = []
    may_go_on = Event()

    def embed(text: str) -> Vector:
        begun.append(text)
        if text == "bad":
            raise EmbeddingError("not this one")
        may_go_on.wait(10)
        return np.ones(1, dtype=np.float32)

    lanes = EmbeddingThreadPools(embed, dimension=1, threads=1)
    with pytest.raises(EmbeddingError):
        await lanes.passages(["bad", *(f"text {number}" for number in range(50))])
    may_go_on.set()
    await lanes.passages(["next"])
    # The thread may have taken one text before the cancellation.
    assert len(begun) <= 3
    assert begun[-1] == "next"
    await lanes.close()
