"""Histories on the twins: whoever judges, no answer stays that a fresh retrieval contradicts."""

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


def history(seed, **told):
    settings = AnswerSettings(**told)
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
def test_no_answer_stays_that_a_fresh_retrieval_contradicts(seed, slices, changes, rechecks):
    told = history(seed, slices=slices, changes=changes, rechecks=rechecks)
    asyncio.run(live(told, 25))
    assert told.stale == []


def test_most_of_what_is_dropped_had_to_be():
    dropped = needed = 0
    for seed in range(3):
        told = history(seed)
        asyncio.run(live(told, 25))
        dropped, needed = dropped + told.dropped, needed + told.needed
    assert needed > 50
    assert dropped <= 1.5 * needed


class Deaf(History):
    """A mistake planted on purpose: changes are told without what they added."""

    async def change(self):
        task = await super().change()
        return type(task)(task.message.model_copy(update={"added": ()}), 0, task.offset, None)


def test_the_check_finds_an_answer_that_should_have_gone():
    settings = AnswerSettings()
    index = MemoryIndex(DIMENSION)
    told = Deaf(random.Random(1), index, index, MemoryAnswerCache(cache=settings), MemoryEventStates(), settings)
    asyncio.run(live(told, 25))
    assert told.stale


@pytest.mark.parametrize("seed", range(30))
async def test_what_was_replaced_before_it_was_judged_is_judged_by_what_stands_in_its_place(seed):
    told = history(seed)
    told.hire()
    for _ in range(2):
        await finished(told.workers[0], [await told.change("doc-0")])
    await told.fill()
    before = {question.key: await told.retrieve(question) for question in told.questions}
    first = await told.change("doc-1")
    while not set(first.message.added).isdisjoint(told.passages["doc-1"]):
        later = await told.change("doc-1")
    if not told.passages["doc-1"] or not first.message.added:
        return  # a delete is told by a later position
    await finished(told.workers[0], [first])
    for question in told.questions:
        look = await told.cache.lookup(TENANT, question.key)
        assert look.positions == {0: first.offset} != {0: later.offset}
        now = await told.retrieve(question)
        comes = {hit for hit, _ in now.sources} - {hit for hit, _ in before[question.key].sources}
        if any(hit in told.passages["doc-1"] for hit in comes):
            assert look.entry is None, f"true for {first.offset}, and has nothing of the document"


async def test_where_the_index_does_not_answer_answers_are_dropped_and_positions_advance():
    class Terms(MemoryIndex):
        async def statistics(self, _terms):
            raise IndexUnavailable("no")

    told = history(3)
    told.terms = Terms(DIMENSION)
    told.hire()
    for _ in range(4):
        await finished(told.workers[0], [await told.change()])
    await told.fill()
    await finished(told.workers[0], [await told.change()])
    looks = [await told.cache.lookup(TENANT, question.key) for question in told.questions]
    assert all(look.entry is None and look.positions == {0: told.offset} for look in looks)


async def test_more_at_once_than_is_judged_drops_everything():
    told = history(3, judged_passages=1)
    told.hire()
    await finished(told.workers[0], [await told.change()])
    await told.fill()
    await finished(told.workers[0], [await told.change() for _ in range(8)])
    looks = [await told.cache.lookup(TENANT, question.key) for question in told.questions]
    assert all(look.entry is None for look in looks)


async def test_an_entry_that_cannot_be_read_is_dropped_by_the_next_change():
    told = history(3)
    told.hire()
    await finished(told.workers[0], [await told.change()])
    epoch = (await told.cache.lookup(TENANT, "q")).epoch
    assert await told.cache.store(TENANT, "q", b"nonsense", epoch=epoch, ttl_s=60)
    await finished(told.workers[0], [await told.change()])
    assert (await told.cache.lookup(TENANT, "q")).entry is None


@pytest.mark.parametrize("fails_at", ["entries", "settle"])
async def test_a_judgement_that_was_broken_off_is_made_again(fails_at):
    told = history(5)
    told.hire()
    for _ in range(3):
        await finished(told.workers[0], [await told.change()])
    await told.fill()
    task = await told.change()
    real = getattr(told.cache, fails_at)

    async def fail(*_args, **_told):
        raise asyncio.CancelledError

    setattr(told.cache, fails_at, fail)
    with pytest.raises(asyncio.CancelledError):
        await finished(told.workers[0], [task])
    setattr(told.cache, fails_at, real)
    await finished(told.workers[0], [task])
    await told.check()
    assert told.stale == []
    assert told.answers, "not everything is dropped"
