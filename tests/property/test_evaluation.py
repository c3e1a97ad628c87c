"""Histories on the twins: no cached answer contradicts a fresh retrieval, whichever worker evaluates it."""

import asyncio
import random

import pytest
from history import DIMENSION, TENANT, History, finished, live
from hypothesis import example, given, settings
from hypothesis import strategies as st

from infra.opensearch.memory import MemoryIndex
from infra.opensearch.port import IndexUnavailable
from infra.redis.memory_answers import MemoryAnswerCache
from infra.redis.memory_states import MemoryEventStates
from infra.settings import AnswerSettings


def new_history(seed, **options):
    settings = AnswerSettings(**options)
    index = MemoryIndex(DIMENSION)
    cache = MemoryAnswerCache(cache=settings)
    return History(random.Random(seed), index, index, cache, MemoryEventStates(), settings)


@settings(max_examples=8, deadline=None)
@example(seed=23214, slices=1, changes=2, rechecks=0)
@example(seed=37582, slices=1, changes=2, rechecks=0)
@example(seed=37023, slices=1, changes=2, rechecks=64)
@given(
    seed=st.integers(0, 2**32),
    slices=st.sampled_from((1, 3)),
    changes=st.sampled_from((2, 1_000)),
    rechecks=st.sampled_from((0, 64)),
)
def test_no_cached_answer_contradicts_a_fresh_retrieval(seed, slices, changes, rechecks):
    history = new_history(seed, slices=slices, changes=changes, rechecks=rechecks)
    asyncio.run(live(history, 25))
    assert history.stale == []


def test_most_dropped_answers_were_stale():
    dropped = needed = 0
    for seed in range(3):
        history = new_history(seed)
        asyncio.run(live(history, 25))
        dropped, needed = dropped + history.dropped, needed + history.needed
    assert needed > 50
    assert dropped <= 1.5 * needed


class OmitsAddedPassages(History):
    """Planted mistake: changes do not name the passages that they added."""

    async def change(self):
        task = await super().change()
        return type(task)(task.message.model_copy(update={"added": ()}), 0, task.offset, None)


def test_the_check_detects_a_stale_answer():
    settings = AnswerSettings()
    index = MemoryIndex(DIMENSION)
    history = OmitsAddedPassages(
        random.Random(1), index, index, MemoryAnswerCache(cache=settings), MemoryEventStates(), settings
    )
    asyncio.run(live(history, 25))
    assert history.stale


@pytest.mark.parametrize("seed", range(30))
async def test_a_version_replaced_before_its_evaluation_is_evaluated_by_the_current_passages(seed):
    history = new_history(seed)
    history.add_worker()
    for _ in range(2):
        await finished(history.workers[0], [await history.change("doc-0")])
    await history.fill()
    before = {question.key: await history.retrieve(question) for question in history.questions}
    first = await history.change("doc-1")
    while not set(first.message.added).isdisjoint(history.passages["doc-1"]):
        later = await history.change("doc-1")
    if not history.passages["doc-1"] or not first.message.added:
        return  # the delete is part of a later change
    await finished(history.workers[0], [first])
    for question in history.questions:
        lookup = await history.cache.lookup(TENANT, question.key)
        assert lookup.positions == {0: first.offset} != {0: later.offset}
        now = await history.retrieve(question)
        entering = {hit for hit, _ in now.sources} - {hit for hit, _ in before[question.key].sources}
        if any(hit in history.passages["doc-1"] for hit in entering):
            assert lookup.entry is None, f"true for {first.offset}, and has nothing of the document"


async def test_without_the_index_answers_are_dropped_and_positions_advance():
    class Terms(MemoryIndex):
        async def statistics(self, _terms):
            raise IndexUnavailable("no")

    history = new_history(3)
    history.terms = Terms(DIMENSION)
    history.add_worker()
    for _ in range(4):
        await finished(history.workers[0], [await history.change()])
    await history.fill()
    await finished(history.workers[0], [await history.change()])
    lookups = [await history.cache.lookup(TENANT, question.key) for question in history.questions]
    assert all(lookup.entry is None and lookup.positions == {0: history.offset} for lookup in lookups)


async def test_a_change_above_the_evaluation_limit_drops_all_answers():
    history = new_history(3, evaluated_passages=1)
    history.add_worker()
    await finished(history.workers[0], [await history.change()])
    await history.fill()
    await finished(history.workers[0], [await history.change() for _ in range(8)])
    lookups = [await history.cache.lookup(TENANT, question.key) for question in history.questions]
    assert all(lookup.entry is None for lookup in lookups)


async def test_an_undecodable_entry_is_dropped_by_the_next_change():
    history = new_history(3)
    history.add_worker()
    await finished(history.workers[0], [await history.change()])
    epoch = (await history.cache.lookup(TENANT, "q")).epoch
    assert await history.cache.store(TENANT, "q", b"nonsense", epoch=epoch, ttl_s=60)
    await finished(history.workers[0], [await history.change()])
    assert (await history.cache.lookup(TENANT, "q")).entry is None


@pytest.mark.parametrize("fails_at", ["entries", "commit"])
async def test_an_interrupted_evaluation_is_repeated(fails_at):
    history = new_history(5)
    history.add_worker()
    for _ in range(3):
        await finished(history.workers[0], [await history.change()])
    await history.fill()
    task = await history.change()
    real = getattr(history.cache, fails_at)

    async def fail(*_args, **_options):
        raise asyncio.CancelledError

    setattr(history.cache, fails_at, fail)
    with pytest.raises(asyncio.CancelledError):
        await finished(history.workers[0], [task])
    setattr(history.cache, fails_at, real)
    await finished(history.workers[0], [task])
    await history.check()
    assert history.stale == []
    assert history.answers, "not everything is dropped"
