"""The use case on in-memory parts; races are set up with gates, never with time."""

import asyncio
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry

from infra.embedding.hashing import HashingEmbedder
from infra.generation.extractive import ExtractiveGenerator
from infra.opensearch.port import IndexUnavailable
from infra.redis.memory_answers import MemoryAnswerCache
from query.answers.answer import AnswerService
from query.answers.refresh_ahead import RefreshOutcome
from query.cache.freshness import FreshnessReader, PositionNotReached
from query.cache.key import AnswerMaker
from query.cache.near_cache import NearCache
from query.cache.subscription import InvalidationSubscription
from query.retrieval.retrieve import Retrieval
from query.telemetry.metrics import QueryMetrics
from schemas.index import StoredChunk
from schemas.positions import AsOf
from schemas.queries import QueryRequest, QueryResponse
from schemas.search import Access, Hit, Windows

READER = Access("acme")
WAIT_S = 10


def chunk(chunk_id, *, tenant="acme", groups=(), version=1):
    return StoredChunk(
        chunk_id=chunk_id,
        tenant=tenant,
        document_id=f"{chunk_id}.md",
        version=version,
        position="documents.v1-0:0",
        text=f"Passage {chunk_id} tells of days.",
        text_sha256="0",
        start=0,
        end=9,
        groups=groups,
    )


@dataclass
class Index:
    """Gives every chunk in both legs, in the order they were put. ``searching`` holds a search back until it is set."""

    chunks: dict[str, StoredChunk] = field(default_factory=dict)
    gone_at_fetch: set[str] = field(default_factory=set)
    at: dict[int, int] = field(default_factory=dict)
    searches: int = 0
    fails: bool = False
    search_began: asyncio.Event = field(default_factory=asyncio.Event)
    searching: asyncio.Event | None = None

    async def search(self, searches):
        self.searches += 1
        if self.fails:
            raise IndexUnavailable("down")
        window = tuple(Hit(name, one.key, 1.0) for name, one in self.chunks.items())
        self.search_began.set()
        if self.searching is not None:
            await self.searching.wait()
        return [Windows(window, window) for _ in searches]

    async def fetch(self, hits):
        there = {hit.chunk_id for hit in hits} - self.gone_at_fetch
        return {name: self.chunks[name] for name in there if name in self.chunks}

    async def positions(self, _tenant):
        if self.fails:
            raise IndexUnavailable("down")
        return dict(self.at)


class CountingEmbedder(HashingEmbedder):
    """``embedding`` holds a question back until it is set, as one waits for its turn."""

    questions = 0
    embedding = None

    async def embed_query(self, text):
        self.questions += 1
        if self.embedding is not None:
            await self.embedding.wait()
        return await super().embed_query(text)


@dataclass
class Service:
    index: Index
    cache: MemoryAnswerCache
    embedder: CountingEmbedder
    answering: AnswerService
    watch: InvalidationSubscription
    registry: CollectorRegistry

    async def ask(self, query="days?", access=READER, **fields):
        request = QueryRequest.model_validate({"query": query, **fields})
        async with asyncio.timeout(WAIT_S):
            return QueryResponse.model_validate_json(await self.answering.answer(request, access))

    async def change(self, name, offset):
        """A change in the order that the write path keeps: searchable, then applied."""
        self.index.chunks[name] = chunk(name)
        self.index.at[0] = offset
        await self.cache.apply("acme", {0: offset}, drop=True)

    def count(self, name, **labels):
        return self.registry.get_sample_value(name, labels) or 0


@asynccontextmanager
async def running(*, wait_s=WAIT_S, watched=True, cache=None, **seen):
    registry = CollectorRegistry()
    metrics, index, embedder = QueryMetrics(registry), Index(), CountingEmbedder()
    cache = cache or MemoryAnswerCache()
    near = NearCache(slices=cache.count, max_bytes=1_000_000)
    watch = InvalidationSubscription(cache, near)
    answering = AnswerService(
        freshness=FreshnessReader(
            cache=cache, near=near, index=index, watch=watch, metrics=metrics, wait_s=wait_s, **seen
        ),
        retrieval=Retrieval(index=index, embedder=embedder, metrics=metrics, window=10, kept=12, rrf_k=60),
        generator=ExtractiveGenerator(),
        cache=cache,
        maker=AnswerMaker("g1", "hashing", "extractive", "rrf"),
        metrics=metrics,
        ttl_s=60,
    )
    listening = asyncio.create_task(watch.run()) if watched else None
    try:
        yield Service(index, cache, embedder, answering, watch, registry)
    finally:
        await answering.close()
        if listening:
            listening.cancel()
            with suppress(asyncio.CancelledError):
                await listening


@pytest.fixture
async def service():
    async with running() as service:
        await service.change("a", 1)
        yield service


def ids(response):
    return [result.document_id.removesuffix(".md") for result in response.results]


async def until(condition):
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for lies inside the parts and has no event
            await asyncio.sleep(0)


async def test_the_second_answer_is_the_first_from_the_cache(service):
    first, second = await service.ask(generate=True), await service.ask("  DAYS? ", generate=True)
    assert (first.cached, second.cached) == (False, True)
    assert (second.results, second.answer, second.citations) == (first.results, first.answer, first.citations)
    assert first.answer
    assert first.as_of.positions == second.as_of.positions == {0: 1}
    assert service.index.searches == 1
    assert service.count("freshline_queries_total", served="hit") == 1
    assert service.count("freshline_queries_total", served="filled") == 1


async def test_who_asks_first_does_not_wait_until_the_answer_is_kept_and_who_asks_next_finds_it(service, monkeypatch):
    may_keep, keeps, looked, cache = asyncio.Event(), asyncio.Event(), [], service.cache
    store, lookup = cache.store, cache.lookup

    async def late(*arguments, **named):
        keeps.set()
        await may_keep.wait()
        return await store(*arguments, **named)

    async def noted(*arguments, **named):
        looked.append(arguments)
        return await lookup(*arguments, **named)

    monkeypatch.setattr(cache, "store", late)
    monkeypatch.setattr(cache, "lookup", noted)
    first = await service.ask()
    async with asyncio.timeout(WAIT_S):
        await keeps.wait()
    again = asyncio.create_task(service.ask())
    await until(lambda: len(looked) == 2)
    assert not again.done()
    may_keep.set()
    assert (first.cached, (await again).cached, service.index.searches) == (False, True, 1)


async def test_a_change_drops_the_answer_and_the_next_one_has_it(service):
    await service.ask()
    await service.change("b", 2)
    after = await service.ask()
    assert (after.cached, ids(after), after.as_of.positions) == (False, ["a", "b"], {0: 2})
    assert (await service.ask()).cached


async def test_a_vector_is_computed_once_for_a_question_asked_again(service):
    await service.ask()
    await service.change("b", 2)
    await service.ask()
    await service.ask(top_k=1)
    assert (service.embedder.questions, service.index.searches) == (1, 3)


async def test_an_answer_overtaken_by_a_change_is_served_but_not_stored(service):
    service.index.searching = asyncio.Event()
    asking = asyncio.create_task(service.ask())
    await service.index.search_began.wait()
    await service.change("b", 2)
    service.index.searching.set()
    overtaken = await asking
    assert (ids(overtaken), overtaken.as_of.positions) == (["a"], {0: 1})
    assert service.count("freshline_fills_overtaken_total") == 1
    after = await service.ask()
    assert (after.cached, ids(after)) == (False, ["a", "b"])


@pytest.fixture
async def waiting(service, monkeypatch):
    """A question that waits for its turn, and what lets it go on. Looks are as old at once as one that has waited."""
    monkeypatch.setattr("query.cache.freshness.LOOK_STANDS_MS", -1.0)
    service.embedder.embedding = turn = asyncio.Event()
    asking = asyncio.create_task(service.ask())
    await until(lambda: service.embedder.questions)
    yield asking, turn
    turn.set()
    await asking


async def test_an_answer_is_true_for_the_moment_in_which_its_search_begins_and_is_kept_as_such(service, waiting):
    asking, turn = waiting
    await service.change("b", 2)
    turn.set()
    answer = await asking
    assert (answer.cached, ids(answer), answer.as_of.positions) == (False, ["a", "b"], {0: 2})
    again = await service.ask()
    assert (again.cached, again.as_of.positions, service.index.searches) == (True, {0: 2}, 1)


async def test_a_look_that_is_young_when_the_search_begins_is_not_taken_again(service, monkeypatch):
    looks, lookup = [], service.cache.lookup

    async def noted(*arguments, **named):
        looks.append(arguments)
        return await lookup(*arguments, **named)

    monkeypatch.setattr(service.cache, "lookup", noted)
    await service.ask()
    for offset, stands_ms, expected in ((2, 60_000.0, 1), (3, -1.0, 2)):
        monkeypatch.setattr("query.cache.freshness.LOOK_STANDS_MS", stands_ms)
        await service.change("b", offset)
        looks.clear()
        assert not (await service.ask()).cached
        assert len(looks) == expected


async def test_who_looks_later_shares_a_retrieval_that_has_not_begun(service, waiting):
    asking, turn = waiting
    await service.change("b", 2)
    newer = asyncio.create_task(service.ask(min_position="documents.v1-0:2"))
    [flight] = service.answering._flights.values()
    await until(lambda: flight.look.standing.as_of.positions == {0: 2})
    turn.set()
    assert [ids(answer) for answer in await asyncio.gather(asking, newer)] == [["a", "b"], ["a", "b"]]
    assert (await newer).as_of.positions == {0: 2}
    assert service.index.searches == 1


async def test_an_answer_that_is_cached_by_the_time_of_its_turn_is_not_retrieved(service, waiting, monkeypatch):
    monkeypatch.setattr("query.answers.answer._LEASE_LOOKS", 0)
    asking, turn = waiting
    async with running(cache=service.cache) as other:
        other.index.chunks = service.index.chunks
        await other.ask()
    turn.set()
    answer = await asking
    assert (answer.cached, ids(answer), service.index.searches) == (True, ["a"], 0)
    assert service.count("freshline_queries_total", served="hit") == 1


async def test_without_a_second_look_the_first_one_stands(service, waiting):
    asking, turn = waiting
    service.cache.available = False
    service.index.positions = None

    async def unknown(_tenant):
        raise IndexUnavailable("down")

    service.index.positions = unknown
    turn.set()
    assert (await asking).as_of.positions == {0: 1}


async def test_an_answer_is_true_for_what_is_known_to_be_searchable_when_its_search_begins():
    known = AsOf(positions={0: 3, 4: 1}, checked_ms=1_000.0)
    async with running(searchable=lambda _tenant: known) as service:
        await service.change("a", 1)
        first, second = await service.ask(), await service.ask()
    assert (first.cached, first.as_of.positions) == (False, {0: 3, 4: 1})
    assert (second.cached, second.as_of.positions) == (True, {0: 1}), "a cached one is true for what is applied to it"


async def test_an_overtaken_answer_is_retrieved_again_for_the_cache_only_while_there_is_room(service, monkeypatch):
    async def overtaken(question, offset):
        service.index.searching, service.index.search_began = asyncio.Event(), asyncio.Event()
        asking = asyncio.create_task(service.ask(question))
        await service.index.search_began.wait()
        await service.cache.apply("acme", {0: offset}, drop=True)
        service.index.searching.set()
        await asking
        service.index.searching = None
        return (await service.ask(question)).cached

    assert await overtaken("days?", 2)
    monkeypatch.setattr(Retrieval, "has_room", False)
    assert not await overtaken("nights?", 3)
    assert service.count("freshline_fills_overtaken_total") == 1
    assert service.index.searches == 4


async def test_a_refill_tells_what_became_of_it(service):
    question = QueryRequest(query="days?")
    assert await service.answering.refill(question, READER) is RefreshOutcome.FILLED
    assert (await service.ask()).cached
    assert await service.answering.refill(question, READER) is RefreshOutcome.THERE
    key, _ = await service.answering.look(question, READER)
    await service.change("b", 2)
    await until(lambda: service.answering._freshness.near_hit("acme", key) is None)
    service.index.searching = asyncio.Event()
    refilling = asyncio.create_task(service.answering.refill(question, READER))
    await until(lambda: service.index.searches == 2)
    await service.change("c", 3)
    service.index.searching.set()
    assert await refilling is RefreshOutcome.UNKEPT, "it was overtaken, as another question may overtake it"
    service.cache.available = False
    assert await service.answering.refill(question, READER) is RefreshOutcome.UNKEPT
    assert service.index.searches == 3, "nothing is retrieved for nobody"


async def test_equal_questions_at_a_time_share_one_retrieval(service):
    service.index.searching = asyncio.Event()
    asking = [asyncio.create_task(service.ask()) for _ in range(20)]
    await service.index.search_began.wait()
    service.index.searching.set()
    answers = await asyncio.gather(*asking)
    assert service.index.searches == 1
    assert all(ids(answer) == ["a"] for answer in answers)


async def test_a_caller_that_goes_away_takes_nothing_from_the_others(service):
    service.index.searching = asyncio.Event()
    first = asyncio.create_task(service.ask())
    await service.index.search_began.wait()
    second = asyncio.create_task(service.ask())
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    service.index.searching.set()
    assert ids(await second) == ["a"]
    assert service.index.searches == 1
    assert (await service.ask()).cached


async def test_a_question_after_a_change_does_not_share_an_older_retrieval(service):
    service.index.searching = asyncio.Event()
    older = asyncio.create_task(service.ask())
    await service.index.search_began.wait()
    await service.change("b", 2)
    service.index.search_began.clear()
    newer = asyncio.create_task(service.ask(min_position="documents.v1-0:2"))
    await service.index.search_began.wait()
    service.index.searching.set()
    assert ids(await older) == ["a"]
    assert ids(await newer) == ["a", "b"]


async def test_a_failure_reaches_every_caller_and_is_not_remembered(service):
    service.index.fails = True
    failures = await asyncio.gather(service.ask(), service.ask(), return_exceptions=True)
    assert [type(failure) for failure in failures] == [IndexUnavailable, IndexUnavailable]
    service.index.fails = False
    assert ids(await service.ask()) == ["a"]


async def test_a_cached_answer_needs_no_index(service):
    await service.ask()
    service.index.fails = True
    assert (await service.ask()).cached


async def test_a_passage_gone_between_search_and_fetch_is_replaced_by_the_next(service):
    for offset, name in enumerate("bcde", start=2):
        await service.change(name, offset)
    service.index.gone_at_fetch = {"a", "c"}
    assert ids(await service.ask(top_k=3)) == ["b", "d", "e"]
    service.index.gone_at_fetch = set("abcde")
    assert ids(await service.ask("another?")) == []


async def test_a_document_that_changes_between_search_and_fetch_is_not_missing(service):
    fetch = service.index.fetch

    async def change_then_fetch(hits):
        service.index.fetch = fetch
        del service.index.chunks["a"]
        service.index.chunks["new"] = chunk("new", version=2)
        return await fetch(hits)

    service.index.fetch = change_then_fetch
    assert ids(await service.ask()) == ["new"]
    assert service.index.searches == 2


async def test_a_passage_closed_between_search_and_fetch_is_not_shown(service):
    service.index.chunks["a"] = chunk("a", groups=("board",))
    service.index.chunks["b"] = chunk("b", groups=("staff", "board"))
    service.index.chunks["c"] = chunk("c", tenant="umbrella")
    assert ids(await service.ask(access=Access("acme", ("staff",)))) == ["b"]
    assert ids(await service.ask()) == []


async def test_without_redis_answers_are_uncached_and_true_for_what_the_index_knows(service):
    await service.ask()
    service.cache.available = False
    service.index.at = {0: 1, 4: 9}
    for _ in range(2):
        answer = await service.ask()
        assert (answer.cached, answer.as_of.positions, ids(answer)) == (False, {0: 1, 4: 9}, ["a"])
    # Left aside for a while, not asked each time.
    assert service.count("freshline_cache_bypasses_total") == 1
    assert service.count("freshline_queries_total", served="uncached") == 2
    service.cache.available = True
    assert not (await service.ask()).cached


async def test_an_answer_past_the_cache_carries_what_is_known_to_be_searchable_and_asks_the_index_for_nothing_more():
    known = AsOf(positions={0: 3}, checked_ms=1_000.0)
    async with running(behind=lambda _tenant: True, searchable=lambda _tenant: known) as service:
        await service.change("a", 3)
        service.index.positions = None
        first, second = await service.ask(), await service.ask()
    assert (first.as_of, second.as_of) == (known, known)
    assert (first.cached, second.cached, ids(second)) == (False, False, ["a"])


async def test_who_waits_for_a_position_past_the_cache_is_answered_by_what_the_index_says_now():
    known = AsOf(positions={0: 3}, checked_ms=1_000.0)
    async with running(behind=lambda _tenant: True, searchable=lambda _tenant: known, wait_s=0) as service:
        await service.change("a", 4)
        answer = await service.ask(min_position="documents.v1-0:4")
    assert answer.as_of.positions == {0: 4}
    assert not answer.cached


async def test_the_cache_is_used_again_after_a_while(service, monkeypatch):
    monkeypatch.setattr("query.cache.freshness.BYPASS_S", 0)
    await service.ask()
    service.cache.available = False
    assert not (await service.ask()).cached
    service.cache.available = True
    assert (await service.ask()).cached


async def test_positions_that_redis_lost_are_read_from_the_index(service):
    await service.ask()
    service.cache.lose_everything()
    service.index.at = {0: 1, 7: 3}
    answer = await service.ask()
    assert (answer.cached, answer.as_of.positions) == (False, {0: 1, 7: 3})
    again = await service.ask()
    assert (again.cached, again.as_of.positions) == (True, {0: 1, 7: 3})


async def test_a_wait_for_a_position_ends_with_its_announcement():
    async with running() as service:
        await until(lambda: service.watch.live)
        asking = asyncio.create_task(service.ask(min_position="documents.v1-0:5"))
        await until(lambda: service.watch._waiters)
        await service.change("a", 4)
        await asyncio.sleep(0)
        assert not asking.done()
        await service.change("b", 5)
        answer = await asking
        assert (ids(answer), answer.as_of.positions) == (["a", "b"], {0: 5})
        assert not service.watch._waiters
        assert service.count("freshline_position_wait_seconds_count", reached="true") == 1


async def test_a_lost_announcement_only_costs_a_moment():
    async with running(watched=False) as service:
        asking = asyncio.create_task(service.ask(min_position="documents.v1-0:5"))
        await until(lambda: service.watch._waiters)
        await service.change("a", 5)
        assert (await asking).as_of.positions == {0: 5}


async def test_a_position_not_reached_in_time_is_refused_with_the_current_ones():
    async with running(wait_s=0.1) as service:
        await service.change("a", 4)
        with pytest.raises(PositionNotReached) as refused:
            await service.ask(min_position="documents.v1-0:5")
        assert refused.value.as_of.positions == {0: 4}
        assert not service.watch._waiters
        assert service.count("freshline_position_wait_seconds_count", reached="false") == 1


async def test_a_position_that_only_the_index_still_knows_is_reached():
    async with running(wait_s=0.1) as service:
        await service.change("a", 4)
        stale = await service.ask()
        service.index.chunks["b"], service.index.at = chunk("b"), {0: 5}
        answer = await service.ask(min_position="documents.v1-0:5")
        assert (ids(stale), ids(answer)) == (["a"], ["a", "b"])
        assert (answer.cached, answer.as_of.positions) == (False, {0: 5})


async def test_a_wait_goes_on_without_redis():
    async with running() as service:
        service.cache.available = False
        asking = asyncio.create_task(service.ask(min_position="documents.v1-0:5"))
        await until(lambda: service.watch._waiters)
        service.index.chunks["a"], service.index.at = chunk("a"), {0: 5}
        answer = await asking
        assert (ids(answer), answer.as_of.positions) == (["a"], {0: 5})


async def test_a_broken_subscription_is_renewed(monkeypatch):
    monkeypatch.setattr("query.cache.subscription.RESUBSCRIBE_S", 0)
    async with running() as service:
        await until(lambda: service.watch.live)
        service.cache.break_subscriptions()
        await until(lambda: not service.watch.live)
        await until(lambda: service.watch.live)


async def test_more_results_than_the_window_holds_widen_it(service):
    for offset in range(2, 30):
        await service.change(f"m{offset}", offset)
    assert len((await service.ask(top_k=25)).results) == 25


async def test_an_unreadable_entry_is_filled_anew(service):
    await service.ask()
    [(key, answer)] = service.cache._slices["acme", 0].answers.items()
    answer.entry = answer.entry[:-1]
    assert not (await service.ask()).cached
    assert (await service.ask()).cached
    assert key in service.cache._slices["acme", 0].answers
