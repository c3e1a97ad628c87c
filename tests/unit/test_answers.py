"""The answer service with in-memory stores. Races are set up with events, never with sleeps."""

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
from query.answers.fill import AnswerFill, AnswerStore
from query.answers.refresh_ahead import RefreshOutcome
from query.cache.freshness import FreshnessReader, FreshnessSources, PositionNotReached
from query.cache.key import AnswerMaker
from query.cache.near_cache import NearCache
from query.cache.subscription import InvalidationSubscription
from query.retrieval.retrieve import FusionPolicy, Retrieval
from query.telemetry.metrics import QueryMetrics
from schemas.index import StoredChunk
from schemas.positions import AsOf
from schemas.queries import QueryRequest, QueryResponse
from schemas.search import Access, Candidates, Hit

READER = Access("acme")
WAIT_S = 10


def chunk(chunk_id, *, tenant="acme", groups=(), version=1):
    return StoredChunk(
        chunk_id=chunk_id,
        tenant=tenant,
        document_id=f"{chunk_id}.md",
        version=version,
        position="documents.v1-0:0",
        text=f"Passage {chunk_id} is about days.",
        text_sha256="0",
        start=0,
        end=9,
        groups=groups,
    )


@dataclass
class Index:
    """Returns every chunk as a candidate of both retrievers, in insertion order. ``may_search`` blocks a search."""

    chunks: dict[str, StoredChunk] = field(default_factory=dict)
    missing_at_fetch: set[str] = field(default_factory=set)
    at: dict[int, int] = field(default_factory=dict)
    searches: int = 0
    fails: bool = False
    search_began: asyncio.Event = field(default_factory=asyncio.Event)
    may_search: asyncio.Event | None = None

    async def search(self, searches):
        self.searches += 1
        if self.fails:
            raise IndexUnavailable("down")
        hits = tuple(Hit(name, chunk.key, 1.0) for name, chunk in self.chunks.items())
        self.search_began.set()
        if self.may_search is not None:
            await self.may_search.wait()
        return [Candidates(hits, hits) for _ in searches]

    async def fetch(self, hits):
        existing = {hit.chunk_id for hit in hits} - self.missing_at_fetch
        return {name: self.chunks[name] for name in existing if name in self.chunks}

    async def positions(self, _tenant):
        if self.fails:
            raise IndexUnavailable("down")
        return dict(self.at)


class CountingEmbedder(HashingEmbedder):
    """``may_embed`` blocks a question, like the queue for a retrieval slot."""

    questions = 0
    may_embed = None

    async def embed_query(self, text):
        self.questions += 1
        if self.may_embed is not None:
            await self.may_embed.wait()
        return await super().embed_query(text)


@dataclass
class Service:
    index: Index
    cache: MemoryAnswerCache
    embedder: CountingEmbedder
    answers: AnswerService
    subscription: InvalidationSubscription
    registry: CollectorRegistry

    async def ask(self, query="days?", access=READER, **fields):
        request = QueryRequest.model_validate({"query": query, **fields})
        async with asyncio.timeout(WAIT_S):
            return QueryResponse.model_validate_json(await self.answers.answer(request, access))

    async def change(self, name, offset):
        """Apply a change in the order of the write path: searchable, then applied to cached answers."""
        self.index.chunks[name] = chunk(name)
        self.index.at[0] = offset
        await self.cache.apply("acme", {0: offset}, drop=True)

    def count(self, name, **labels):
        return self.registry.get_sample_value(name, labels) or 0


class Monitor:
    def __init__(self, *, lagging=False, searchable=None):
        self._lagging, self._searchable = lagging, searchable

    def is_lagging(self, _tenant):
        return self._lagging

    def searchable(self, _tenant):
        return self._searchable


@asynccontextmanager
async def running(*, wait_s=WAIT_S, subscribed=True, cache=None, monitor=None):
    registry = CollectorRegistry()
    metrics, index, embedder = QueryMetrics(registry), Index(), CountingEmbedder()
    cache = cache or MemoryAnswerCache()
    near = NearCache(slices=cache.count, max_bytes=1_000_000)
    subscription = InvalidationSubscription(cache, near)
    sources = FreshnessSources(cache, near, index, subscription, *([monitor] if monitor else []))
    freshness = FreshnessReader(sources, metrics=metrics, wait_s=wait_s)
    fill = AnswerFill(
        freshness=freshness,
        retrieval=Retrieval(
            index=index, embedder=embedder, metrics=metrics, policy=FusionPolicy(candidates=10, kept=12, rrf_k=60)
        ),
        generator=ExtractiveGenerator(),
        store=AnswerStore(cache, ttl_s=60),
        metrics=metrics,
    )
    maker = AnswerMaker("g1", "hashing", "extractive", "rrf")
    answers = AnswerService(freshness=freshness, fill=fill, maker=maker, metrics=metrics)
    receiving = asyncio.create_task(subscription.run()) if subscribed else None
    try:
        yield Service(index, cache, embedder, answers, subscription, registry)
    finally:
        await answers.close()
        if receiving:
            receiving.cancel()
            with suppress(asyncio.CancelledError):
                await receiving


@pytest.fixture
async def service():
    async with running() as service:
        await service.change("a", 1)
        yield service


def ids(response):
    return [result.document_id.removesuffix(".md") for result in response.results]


async def until(condition):
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - no event to await
            await asyncio.sleep(0)


async def test_the_second_request_hits_the_answer_of_the_first(service):
    first, second = await service.ask(generate=True), await service.ask("  DAYS? ", generate=True)
    assert (first.cached, second.cached) == (False, True)
    assert (second.results, second.answer, second.citations) == (first.results, first.answer, first.citations)
    assert first.answer
    assert first.as_of.positions == second.as_of.positions == {0: 1}
    assert service.index.searches == 1
    assert service.count("freshline_queries_total", cache_status="hit") == 1
    assert service.count("freshline_queries_total", cache_status="filled") == 1


async def test_only_a_repeated_question_waits_until_the_answer_is_stored(service, monkeypatch):
    may_store, storing, lookups, cache = asyncio.Event(), asyncio.Event(), [], service.cache
    store, lookup = cache.store, cache.lookup

    async def blocked_store(*arguments, **named):
        storing.set()
        await may_store.wait()
        return await store(*arguments, **named)

    async def recorded_lookup(*arguments, **named):
        lookups.append(arguments)
        return await lookup(*arguments, **named)

    monkeypatch.setattr(cache, "store", blocked_store)
    monkeypatch.setattr(cache, "lookup", recorded_lookup)
    first = await service.ask()
    async with asyncio.timeout(WAIT_S):
        await storing.wait()
    again = asyncio.create_task(service.ask())
    await until(lambda: len(lookups) == 2)
    assert not again.done()
    may_store.set()
    assert (first.cached, (await again).cached, service.index.searches) == (False, True, 1)


async def test_a_change_invalidates_the_answer_and_the_next_one_reflects_it(service):
    await service.ask()
    await service.change("b", 2)
    after = await service.ask()
    assert (after.cached, ids(after), after.as_of.positions) == (False, ["a", "b"], {0: 2})
    assert (await service.ask()).cached


async def test_the_vector_of_a_question_is_cached(service):
    await service.ask()
    await service.change("b", 2)
    await service.ask()
    await service.ask(top_k=1)
    assert (service.embedder.questions, service.index.searches) == (1, 3)


async def test_an_answer_that_loses_the_epoch_race_is_served_but_not_stored(service):
    service.index.may_search = asyncio.Event()
    asking = asyncio.create_task(service.ask())
    await service.index.search_began.wait()
    await service.change("b", 2)
    service.index.may_search.set()
    answer = await asking
    assert (ids(answer), answer.as_of.positions) == (["a"], {0: 1})
    assert service.count("freshline_fills_lost_epoch_race_total") == 1
    after = await service.ask()
    assert (after.cached, ids(after)) == (False, ["a", "b"])


@pytest.fixture
async def queued(service, monkeypatch):
    """A queued question, and the event that admits it. Every read counts as too old when its search starts."""
    monkeypatch.setattr("query.cache.freshness.MAX_READ_AGE_MS", -1.0)
    service.embedder.may_embed = admit = asyncio.Event()
    asking = asyncio.create_task(service.ask())
    await until(lambda: service.embedder.questions)
    yield asking, admit
    admit.set()
    await asking


async def test_an_answer_reflects_and_is_stored_for_the_positions_at_the_start_of_its_search(service, queued):
    asking, admit = queued
    await service.change("b", 2)
    admit.set()
    answer = await asking
    assert (answer.cached, ids(answer), answer.as_of.positions) == (False, ["a", "b"], {0: 2})
    again = await service.ask()
    assert (again.cached, again.as_of.positions, service.index.searches) == (True, {0: 2}, 1)


async def test_a_recent_read_is_not_repeated_when_the_search_starts(service, monkeypatch):
    lookups, lookup = [], service.cache.lookup

    async def recorded_lookup(*arguments, **named):
        lookups.append(arguments)
        return await lookup(*arguments, **named)

    monkeypatch.setattr(service.cache, "lookup", recorded_lookup)
    await service.ask()
    for offset, max_age_ms, expected in ((2, 60_000.0, 1), (3, -1.0, 2)):
        monkeypatch.setattr("query.cache.freshness.MAX_READ_AGE_MS", max_age_ms)
        await service.change("b", offset)
        lookups.clear()
        assert not (await service.ask()).cached
        assert len(lookups) == expected


async def test_a_later_read_joins_a_flight_whose_search_has_not_started(service, queued):
    asking, admit = queued
    await service.change("b", 2)
    newer = asyncio.create_task(service.ask(min_position="documents.v1-0:2"))
    [flight] = service.answers._flights.flights()
    await until(lambda: flight.read.snapshot.as_of.positions == {0: 2})
    admit.set()
    assert [ids(answer) for answer in await asyncio.gather(asking, newer)] == [["a", "b"], ["a", "b"]]
    assert (await newer).as_of.positions == {0: 2}
    assert service.index.searches == 1


async def test_an_answer_cached_while_queued_is_not_retrieved(service, queued, monkeypatch):
    monkeypatch.setattr("query.answers.answer._LEASE_POLLS", 0)
    asking, admit = queued
    async with running(cache=service.cache) as other:
        other.index.chunks = service.index.chunks
        await other.ask()
    admit.set()
    answer = await asking
    assert (answer.cached, ids(answer), service.index.searches) == (True, ["a"], 0)
    assert service.count("freshline_queries_total", cache_status="hit") == 1


async def test_the_first_read_is_used_if_it_cannot_be_repeated(service, queued):
    asking, admit = queued
    service.cache.available = False

    async def unavailable(_tenant):
        raise IndexUnavailable("down")

    service.index.positions = unavailable
    admit.set()
    assert (await asking).as_of.positions == {0: 1}


async def test_a_filled_answer_also_reflects_positions_known_to_be_searchable():
    searchable = AsOf(positions={0: 3, 4: 1}, checked_ms=1_000.0)
    async with running(monitor=Monitor(searchable=searchable)) as service:
        await service.change("a", 1)
        first, second = await service.ask(), await service.ask()
    assert (first.cached, first.as_of.positions) == (False, {0: 3, 4: 1})
    assert (second.cached, second.as_of.positions) == (True, {0: 1}), "a cached answer reflects only applied positions"


async def test_a_fill_that_lost_the_epoch_race_is_retried_only_with_spare_capacity(service, monkeypatch):
    async def is_stored_after_race(question, offset):
        service.index.may_search, service.index.search_began = asyncio.Event(), asyncio.Event()
        asking = asyncio.create_task(service.ask(question))
        await service.index.search_began.wait()
        await service.cache.apply("acme", {0: offset}, drop=True)
        service.index.may_search.set()
        await asking
        service.index.may_search = None
        return (await service.ask(question)).cached

    assert await is_stored_after_race("days?", 2)
    monkeypatch.setattr(Retrieval, "has_spare_capacity", False)
    assert not await is_stored_after_race("nights?", 3)
    assert service.count("freshline_fills_lost_epoch_race_total") == 1
    assert service.index.searches == 4


async def test_a_refresh_returns_its_outcome(service):
    question = QueryRequest(query="days?")
    assert await service.answers.refresh(question, READER) is RefreshOutcome.FILLED
    assert (await service.ask()).cached
    assert await service.answers.refresh(question, READER) is RefreshOutcome.CACHED
    key, _ = await service.answers.read(question, READER)
    await service.change("b", 2)
    await until(lambda: service.answers._freshness.near_hit("acme", key) is None)
    service.index.may_search = asyncio.Event()
    refreshing = asyncio.create_task(service.answers.refresh(question, READER))
    await until(lambda: service.index.searches == 2)
    await service.change("c", 3)
    service.index.may_search.set()
    assert await refreshing is RefreshOutcome.NOT_STORED, "it lost the epoch race"
    service.cache.available = False
    assert await service.answers.refresh(question, READER) is RefreshOutcome.NOT_STORED
    assert service.index.searches == 3, "nothing is retrieved that cannot be stored"


async def test_concurrent_equal_questions_share_one_retrieval(service):
    service.index.may_search = asyncio.Event()
    asking = [asyncio.create_task(service.ask()) for _ in range(20)]
    await service.index.search_began.wait()
    service.index.may_search.set()
    answers = await asyncio.gather(*asking)
    assert service.index.searches == 1
    assert all(ids(answer) == ["a"] for answer in answers)


async def test_a_cancelled_caller_does_not_cancel_the_flight(service):
    service.index.may_search = asyncio.Event()
    first = asyncio.create_task(service.ask())
    await service.index.search_began.wait()
    second = asyncio.create_task(service.ask())
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    service.index.may_search.set()
    assert ids(await second) == ["a"]
    assert service.index.searches == 1
    assert (await service.ask()).cached


async def test_a_question_after_a_change_does_not_join_an_older_flight(service):
    service.index.may_search = asyncio.Event()
    older = asyncio.create_task(service.ask())
    await service.index.search_began.wait()
    await service.change("b", 2)
    service.index.search_began.clear()
    newer = asyncio.create_task(service.ask(min_position="documents.v1-0:2"))
    await service.index.search_began.wait()
    service.index.may_search.set()
    assert ids(await older) == ["a"]
    assert ids(await newer) == ["a", "b"]


async def test_a_failure_is_raised_to_every_caller_and_not_cached(service):
    service.index.fails = True
    failures = await asyncio.gather(service.ask(), service.ask(), return_exceptions=True)
    assert [type(failure) for failure in failures] == [IndexUnavailable, IndexUnavailable]
    service.index.fails = False
    assert ids(await service.ask()) == ["a"]


async def test_a_hit_does_not_need_the_index(service):
    await service.ask()
    service.index.fails = True
    assert (await service.ask()).cached


async def test_a_passage_removed_between_search_and_fetch_is_replaced_by_the_next(service):
    for offset, name in enumerate("bcde", start=2):
        await service.change(name, offset)
    service.index.missing_at_fetch = {"a", "c"}
    assert ids(await service.ask(top_k=3)) == ["b", "d", "e"]
    service.index.missing_at_fetch = set("abcde")
    assert ids(await service.ask("another?")) == []


async def test_a_document_changed_between_search_and_fetch_is_searched_again(service):
    fetch = service.index.fetch

    async def change_then_fetch(hits):
        service.index.fetch = fetch
        del service.index.chunks["a"]
        service.index.chunks["new"] = chunk("new", version=2)
        return await fetch(hits)

    service.index.fetch = change_then_fetch
    assert ids(await service.ask()) == ["new"]
    assert service.index.searches == 2


async def test_access_is_checked_after_the_fetch(service):
    service.index.chunks["a"] = chunk("a", groups=("board",))
    service.index.chunks["b"] = chunk("b", groups=("staff", "board"))
    service.index.chunks["c"] = chunk("c", tenant="umbrella")
    assert ids(await service.ask(access=Access("acme", ("staff",)))) == ["b"]
    assert ids(await service.ask()) == []


async def test_without_redis_answers_are_uncached_and_reflect_the_positions_of_the_index(service):
    await service.ask()
    service.cache.available = False
    service.index.at = {0: 1, 4: 9}
    for _ in range(2):
        answer = await service.ask()
        assert (answer.cached, answer.as_of.positions, ids(answer)) == (False, {0: 1, 4: 9}, ["a"])
    # Bypassed for a while: not every request calls Redis.
    assert service.count("freshline_cache_bypasses_total") == 1
    assert service.count("freshline_queries_total", cache_status="uncached") == 2
    service.cache.available = True
    assert not (await service.ask()).cached


async def test_a_lagging_tenant_uses_monitored_positions_without_a_read_of_the_index():
    searchable = AsOf(positions={0: 3}, checked_ms=1_000.0)
    async with running(monitor=Monitor(lagging=True, searchable=searchable)) as service:
        await service.change("a", 3)
        service.index.positions = None
        first, second = await service.ask(), await service.ask()
    assert (first.as_of, second.as_of) == (searchable, searchable)
    assert (first.cached, second.cached, ids(second)) == (False, False, ["a"])


async def test_a_lagging_tenant_with_min_position_reads_the_index():
    searchable = AsOf(positions={0: 3}, checked_ms=1_000.0)
    async with running(monitor=Monitor(lagging=True, searchable=searchable), wait_s=0) as service:
        await service.change("a", 4)
        answer = await service.ask(min_position="documents.v1-0:4")
    assert answer.as_of.positions == {0: 4}
    assert not answer.cached


async def test_the_bypass_ends_after_a_while(service, monkeypatch):
    monkeypatch.setattr("query.cache.freshness.BYPASS_S", 0)
    await service.ask()
    service.cache.available = False
    assert not (await service.ask()).cached
    service.cache.available = True
    assert (await service.ask()).cached


async def test_positions_lost_by_redis_are_seeded_from_the_index(service):
    await service.ask()
    service.cache.lose_everything()
    service.index.at = {0: 1, 7: 3}
    answer = await service.ask()
    assert (answer.cached, answer.as_of.positions) == (False, {0: 1, 7: 3})
    again = await service.ask()
    assert (again.cached, again.as_of.positions) == (True, {0: 1, 7: 3})


async def test_a_wait_for_a_position_ends_with_its_message():
    async with running() as service:
        await until(lambda: service.subscription.live)
        asking = asyncio.create_task(service.ask(min_position="documents.v1-0:5"))
        await until(lambda: service.subscription._waiters)
        await service.change("a", 4)
        await asyncio.sleep(0)
        assert not asking.done()
        await service.change("b", 5)
        answer = await asking
        assert (ids(answer), answer.as_of.positions) == (["a", "b"], {0: 5})
        assert not service.subscription._waiters
        assert service.count("freshline_position_wait_seconds_count", reached="true") == 1


async def test_polling_covers_a_lost_message():
    async with running(subscribed=False) as service:
        asking = asyncio.create_task(service.ask(min_position="documents.v1-0:5"))
        await until(lambda: service.subscription._waiters)
        await service.change("a", 5)
        assert (await asking).as_of.positions == {0: 5}


async def test_a_position_not_reached_in_time_is_rejected_with_the_current_positions():
    async with running(wait_s=0.1) as service:
        await service.change("a", 4)
        with pytest.raises(PositionNotReached) as rejected:
            await service.ask(min_position="documents.v1-0:5")
        assert rejected.value.as_of.positions == {0: 4}
        assert not service.subscription._waiters
        assert service.count("freshline_position_wait_seconds_count", reached="false") == 1


async def test_a_position_lost_by_redis_is_reached_through_the_index():
    async with running(wait_s=0.1) as service:
        await service.change("a", 4)
        stale = await service.ask()
        service.index.chunks["b"], service.index.at = chunk("b"), {0: 5}
        answer = await service.ask(min_position="documents.v1-0:5")
        assert (ids(stale), ids(answer)) == (["a"], ["a", "b"])
        assert (answer.cached, answer.as_of.positions) == (False, {0: 5})


async def test_a_wait_continues_without_redis():
    async with running() as service:
        service.cache.available = False
        asking = asyncio.create_task(service.ask(min_position="documents.v1-0:5"))
        await until(lambda: service.subscription._waiters)
        service.index.chunks["a"], service.index.at = chunk("a"), {0: 5}
        answer = await asking
        assert (ids(answer), answer.as_of.positions) == (["a"], {0: 5})


async def test_a_broken_subscription_reconnects(monkeypatch):
    monkeypatch.setattr("query.cache.subscription.RESUBSCRIBE_S", 0)
    async with running() as service:
        await until(lambda: service.subscription.live)
        service.cache.break_subscriptions()
        await until(lambda: not service.subscription.live)
        await until(lambda: service.subscription.live)


async def test_top_k_above_the_number_of_candidates_increases_it(service):
    for offset in range(2, 30):
        await service.change(f"m{offset}", offset)
    assert len((await service.ask(top_k=25)).results) == 25


async def test_an_unreadable_entry_is_replaced(service):
    await service.ask()
    [(key, answer)] = service.cache._slices["acme", 0].answers.items()
    answer.entry = answer.entry[:-1]
    assert not (await service.ask()).cached
    assert (await service.ask()).cached
    assert key in service.cache._slices["acme", 0].answers
