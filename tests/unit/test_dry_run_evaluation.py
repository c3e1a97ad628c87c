"""Dry runs report what the step does, also if it cannot evaluate; an undetermined result is an error."""

import numpy as np
import pytest
from test_streams_steps import DIMENSION, Bench, Lines, Parsers, event, outcomes_of, plan

from infra.blobs.memory import MemoryBlobStore
from infra.opensearch.port import IndexUnavailable
from infra.redis.entry import Entry
from infra.redis.memory_answers import MemoryAnswerCache
from infra.redis.memory_states import MemoryEventStates
from infra.settings import AnswerSettings
from schemas.index import StoredChunk
from schemas.search import Access, HybridSearch
from streams.core.invalidation.change_log import encode_changes
from streams.core.invalidation.entrants import entrant
from streams.core.invalidation.evidence import Change, Evidence, Passage, Statistics, TermCounts
from streams.dry_run import DryRun, DryRunUnavailable, Preparation
from streams.evaluation import EvaluationContext, FusionParameters
from streams.slice_evaluators import SliceEvaluators
from streams.steps.invalidate import Invalidate

KEPT, FUSED = 12, 5
FUSION = FusionParameters(DIMENSION, kept=KEPT, fused=FUSED, rrf_k=60)
QUESTIONS = ("blue room", "coffee machine")
DOCUMENTS = (
    plan(1, "blue room booked", "green room plants"),
    plan(5, "coffee machine with milk", document_id="other.md"),
)


class World:
    """An installation of twins in which two questions were asked.

    Attributes:
        changes: index changes of the documents.
    """

    def __init__(self, settings, candidates=KEPT):
        self.bench = Bench(MemoryBlobStore())
        self.cache = MemoryAnswerCache(cache=settings)
        self._settings = settings
        self._candidates = candidates

    async def fill(self):
        self.changes = [change for _, change in await self.bench.run(*DOCUMENTS)]
        for text in QUESTIONS:
            [vector] = await self.bench.embedder.embed_passages([text])
            search = HybridSearch(text, vector, Access("acme"), self._candidates)
            [candidates] = await self.bench.index.search([search])
            hit = candidates.lexical[0]
            [(chunk_id, found)] = (await self.bench.index.fetch([hit])).items()
            sources = ((chunk_id, found.version),)
            entry = Entry(b"{}", search, 1, sources, candidates.vector, candidates.lexical, 1.0, {})
            found = await self.cache.lookup("acme", text)
            first, evidence = entry.encode()
            assert await self.cache.store("acme", text, first, epoch=found.epoch, ttl_s=600, evidence=evidence)

    def new_dry_run(self):
        index = self.bench.index
        return DryRun(
            index=index,
            terms=index,
            preparation=Preparation(Parsers(), Lines(), "profile", self.bench.embedder),
            context=EvaluationContext.of(self.cache, index, index, fusion=FUSION, settings=self._settings),
        )

    async def reported(self, content):
        """Question → reason, as a dry run reports it."""
        found = await self.new_dry_run().run(event(9, content), content or b"")
        assert found.answers == len(QUESTIONS)
        return {one.question: one.reason for one in found.affected}

    async def done(self, content):
        """Which answers the step drops then."""
        index = self.bench.index
        step = Invalidate(
            self.cache,
            SliceEvaluators(self.cache, index, index, fusion=FUSION, settings=self._settings),
            MemoryEventStates(),
        )
        lines = () if content is None else content.decode().splitlines()
        [(_, change)] = await self.bench.run(plan(9, *lines, deleted=content is None))
        before = await self.there()
        await outcomes_of(step, change)
        return before - await self.there()

    async def there(self):
        return {text for text in QUESTIONS if (await self.cache.lookup("acme", text)).entry is not None}


@pytest.fixture
async def world():
    made = World(AnswerSettings())
    await made.fill()
    return made


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, {"blue room": "source_changed"}),
        (b"green room plants", {"blue room": "source_changed"}),
        (b"blue room booked\ngreen room plants\nred chairs", {}),
        (b"blue room booked\ngreen room plants\ncoffee machine", {"coffee machine": "enters_results"}),
    ],
    ids=["delete", "a passage goes", "nothing near", "a passage comes in"],
)
async def test_what_is_reported_is_what_the_step_does(world, content, why):
    assert await world.reported(content) == why
    assert await world.done(content) == set(why)


async def test_an_entering_passage_is_reported_with_its_ranks(world):
    content = b"blue room booked\ngreen room plants\nred chairs\ncoffee machine"
    [one] = (await world.new_dry_run().run(event(9, content), content)).affected
    assert (one.passage, one.vector_rank, one.lexical_rank) == ("coffee machine", 1, 1)


@pytest.mark.parametrize("waits", [False, True], ids=["nothing waits", "a change waits"])
async def test_an_index_that_fails_while_answers_are_read_is_no_all_clear(world, waits):
    if waits:
        for number in range(world.cache.count):
            await world.cache.append("acme", number, {0: 1}, encode_changes([world.changes[1]]))
    term_counts, failed = world.bench.index.term_counts, []

    async def fails_once(wanted):
        if not failed:
            failed.append(True)
            raise IndexUnavailable("no answer")
        return await term_counts(wanted)

    world.bench.index.term_counts = fails_once
    with pytest.raises(IndexUnavailable):
        await world.reported(None)
    assert failed
    assert await world.there() == set(QUESTIONS)
    assert await world.reported(None) == {"blue room": "source_changed"}


async def test_an_edit_of_more_passages_than_are_evaluated_drops_all():
    world = World(AnswerSettings(evaluated_passages=1))
    await world.fill()
    assert await world.reported(None) == dict.fromkeys(QUESTIONS, "not_evaluated")
    assert await world.done(None) == set(QUESTIONS)


async def test_changes_that_wait_and_are_too_many_are_stated():
    world = World(AnswerSettings(evaluated_passages=2))
    await world.fill()
    for number in range(world.cache.count):
        await world.cache.append("acme", number, {0: 1}, encode_changes(world.changes))
    with pytest.raises(DryRunUnavailable, match="3 passages changed at once"):
        await world.reported(None)
    assert await world.there() == set(QUESTIONS)


@pytest.mark.parametrize(("rechecks", "why"), [(64, "uncertain"), (0, "not_evaluated")])
async def test_answers_that_had_to_be_retrieved_again_are_reported_as_such(rechecks, why):
    # If a passage that is not a source is removed, an incomplete candidate list has no replacement for it.
    world = World(AnswerSettings(rechecks=rechecks), candidates=2)
    await world.fill()
    content = b"blue room booked\nred chairs"
    reported, dropped = await world.reported(content), await world.done(content)
    assert reported
    assert set(reported.values()) == {why}
    # What is unclear the step retrieves again; what is too much it drops.
    assert dropped == (reported.keys() if why == "not_evaluated" else set())


# Which passage enters


def passage(name, vector, *, groups=(), **terms):
    chunk = StoredChunk(
        chunk_id=name,
        tenant="acme",
        document_id=f"{name}.md",
        version=1,
        position="documents.v1-0:1",
        generation="g1",
        number=0,
        text=name,
        text_sha256="",
        start=0,
        end=len(name),
        groups=groups,
    )
    return Passage(chunk, np.array(vector, dtype=np.float32), TermCounts.of(terms))


def evidence(vector_candidates, lexical_candidates, top_k=2, **terms):
    return Evidence(
        key="q",
        search=HybridSearch("q", np.array([1, 0], dtype=np.float32), Access("acme"), KEPT),
        terms=terms,
        top_k=top_k,
        sources=(),
        vector_candidates=vector_candidates,
        lexical_candidates=lexical_candidates,
    )


def test_the_entering_passage_with_the_best_rank_of_both_retrievers_is_reported():
    current = evidence((("a", 0.9), ("b", 0.8)), (("a", TermCounts({"tea": 1}, 4)),), tea=1)
    near, full = passage("near", (1, 0), cake=1), passage("full", (0.9, 0.1), tea=3)
    hidden = passage("hidden", (1, 0), groups=("hr",), tea=9)
    change = Change(frozenset({"b"}), (near, full, hidden))
    statistics = Statistics(100, 400, {"tea": 3})
    found = entrant(current, change, statistics, fused=FUSED, rrf_k=60)
    assert (found.passage.chunk.chunk_id, found.vector_rank, found.lexical_rank) == ("full", 2, 1)
    unlike = Change(frozenset(), (passage("far", (-1, 0), cake=1),))
    assert entrant(current, unlike, statistics, fused=FUSED, rrf_k=60) is None
