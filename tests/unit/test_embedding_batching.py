"""Calls put together: what is shared, what fails, what is taken back. The inner model is a puppet on strings."""

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from infra.embedding.batching import BatchingEmbedder
from infra.embedding.hashing import HashingEmbedder
from infra.embedding.port import EmbeddingError, EmbeddingThrottled, Matrix


class Puppet(HashingEmbedder):
    """Records each batch, waits for permission, and fails on request."""

    def __init__(self, failing: dict[str, Exception] | None = None) -> None:
        super().__init__(dimension=16)
        self.batches: list[tuple[str, ...]] = []
        self.let_through = asyncio.Event()
        self.at_a_time = self.most_at_a_time = 0
        self.failing = failing or {}
        self.is_closed = False

    async def embed_passages(self, texts: Sequence[str]) -> Matrix:
        self.batches.append(tuple(texts))
        self.at_a_time += 1
        self.most_at_a_time = max(self.most_at_a_time, self.at_a_time)
        try:
            await self.let_through.wait()
        finally:
            self.at_a_time -= 1
        for text in texts:
            if text in self.failing:
                raise self.failing[text]
        return await super().embed_passages(texts)

    async def close(self) -> None:
        self.is_closed = True


async def commit() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def start(embedder: BatchingEmbedder, *texts: str) -> asyncio.Task[Matrix]:
    return asyncio.create_task(embedder.embed_passages(texts))


async def test_idle_starts_at_once_and_what_arrives_meanwhile_continues_together():
    puppet = Puppet()
    embedder = BatchingEmbedder(puppet, batch_size=3, batches=1)
    calls = [start(embedder, "a")]
    await commit()
    assert puppet.batches == [("a",)]
    calls += [start(embedder, "bb", "cccc"), start(embedder, "ddd"), start(embedder, "e")]
    await commit()
    puppet.let_through.set()
    await asyncio.gather(*calls)
    # A turn each, then the first again; longest first within a go.
    assert puppet.batches == [("a",), ("ddd", "bb", "e"), ("cccc",)]


async def test_continues_and_their_size_are_bounded():
    puppet = Puppet()
    embedder = BatchingEmbedder(puppet, batch_size=4, batches=2)
    calls = [start(embedder, *(f"{call}-{text}" for text in range(7))) for call in range(9)]
    await commit()
    puppet.let_through.set()
    await asyncio.gather(*calls)
    assert puppet.most_at_a_time == 2
    assert max(map(len, puppet.batches)) == 4
    assert sum(map(len, puppet.batches)) == 63


async def test_equal_texts_are_embedded_once_even_while_in_progress():
    puppet = Puppet()
    embedder = BatchingEmbedder(puppet, batch_size=2, batches=1)
    first = start(embedder, "a", "b", "a")
    await commit()
    second = start(embedder, "b", "c")
    third = start(embedder, "c", "a")
    await commit()
    puppet.let_through.set()
    one, two, three = await asyncio.gather(first, second, third)
    assert sorted(text for go in puppet.batches for text in go) == ["a", "b", "c"]
    expected = {text: puppet._embed(text) for text in "abc"}
    assert np.array_equal(one, [expected["a"], expected["b"], expected["a"]])
    assert np.array_equal(two, [expected["b"], expected["c"]])
    assert np.array_equal(three, [expected["c"], expected["a"]])


async def test_an_edit_supersedes_an_upload():
    puppet = Puppet()
    embedder = BatchingEmbedder(puppet, batch_size=2, batches=1)
    upload = start(embedder, *(f"text {number}" for number in range(100)))
    await commit()
    edit = start(embedder, "edit")
    await commit()
    puppet.let_through.set()
    await edit
    assert len(puppet.batches) <= 3
    await upload


async def test_a_failing_text_fails_only_the_calls_that_want_it():
    puppet = Puppet({"bad": EmbeddingError("not this one")})
    embedder = BatchingEmbedder(puppet, batch_size=8, batches=1)
    busy = start(embedder, "busy")
    await commit()
    calls = [start(embedder, "x", "y"), start(embedder, "y", "bad"), start(embedder, "bad")]
    await commit()
    puppet.let_through.set()
    good, bad, also_bad = await asyncio.gather(*calls, return_exceptions=True)
    assert set(puppet.batches[1]) == {"x", "y", "bad"}, "they were to travel together"
    assert np.array_equal(good, [puppet._embed("x"), puppet._embed("y")])
    assert isinstance(bad, EmbeddingError)
    assert isinstance(also_bad, EmbeddingError)
    await busy
    assert (await embedder.embed_passages(["y"])).shape == (1, 16)


async def test_throttling_is_not_answered_with_more_calls():
    puppet = Puppet({"a": EmbeddingThrottled("busy", retry_after_s=7)})
    puppet.let_through.set()
    embedder = BatchingEmbedder(puppet, batch_size=8, batches=1)
    with pytest.raises(EmbeddingThrottled) as raised:
        await embedder.embed_passages(["a", "b", "c"])
    assert raised.value.retry_after_s == 7
    assert len(puppet.batches) == 1


async def test_a_cancelled_call_takes_back_what_no_caller_else_wants():
    puppet = Puppet()
    embedder = BatchingEmbedder(puppet, batch_size=1, batches=1)
    busy = start(embedder, "busy")
    await commit()
    cancelled = start(embedder, "mine", "shared")
    other = start(embedder, "shared")
    await commit()
    cancelled.cancel()
    await commit()
    puppet.let_through.set()
    await asyncio.gather(busy, other)
    assert puppet.batches == [("busy",), ("shared",)]
    # And it can be asked for again.
    assert np.array_equal(await embedder.embed_passages(["mine"]), [puppet._embed("mine")])


async def test_cancelling_a_call_in_progress_leaves_the_others_their_vectors():
    puppet = Puppet()
    embedder = BatchingEmbedder(puppet, batch_size=1, batches=1)
    first, second = start(embedder, "same"), start(embedder, "same")
    await commit()
    first.cancel()
    await commit()
    puppet.let_through.set()
    assert np.array_equal(await second, [puppet._embed("same")])


async def test_callers_beyond_the_limit_wait_at_the_door():
    puppet = Puppet()
    embedder = BatchingEmbedder(puppet, batch_size=8, batches=8, max_calls=1)
    first, second = start(embedder, "a"), start(embedder, "b")
    await commit()
    assert puppet.batches == [("a",)]
    puppet.let_through.set()
    await asyncio.gather(first, second)
    assert puppet.batches == [("a",), ("b",)]


async def test_questions_pass_a_full_queue():
    puppet = Puppet()
    embedder = BatchingEmbedder(puppet, batch_size=1, batches=1)
    upload = start(embedder, "a", "b", "c")
    await commit()
    assert np.array_equal(await embedder.embed_query("why"), puppet._embed("why"))
    puppet.let_through.set()
    await upload


async def test_closing_fails_what_waits_and_closes_the_model():
    puppet = Puppet()
    embedder = BatchingEmbedder(puppet, batch_size=1, batches=1)
    call = start(embedder, "a", "b")
    await commit()
    await embedder.close()
    with pytest.raises(EmbeddingError, match="closed"):
        await call
    with pytest.raises(EmbeddingError, match="closed"):
        await embedder.embed_passages(["c"])
    assert puppet.is_closed
    assert puppet.batches == [("a",)]
