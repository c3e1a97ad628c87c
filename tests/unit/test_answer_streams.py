"""Streamed answers: order of events, sharing, storing, and cancellation."""

import asyncio
import json
from contextlib import aclosing

import pytest
from prometheus_client import CollectorRegistry

from infra.embedding.hashing import HashingEmbedder
from infra.generation.port import AnswerPart, GenerationError, GenerationThrottled, Written
from infra.opensearch.port import IndexUnavailable
from infra.redis.memory_answers import MemoryAnswerCache
from query.answers.answer import AnswerService
from query.answers.broadcast import Broadcast
from query.answers.fill import AnswerFill, AnswerStore
from query.answers.stream import AnswerStreams
from query.cache.freshness import FreshnessReader, FreshnessSources
from query.cache.key import AnswerMaker
from query.cache.near_cache import NearCache
from query.cache.subscription import InvalidationSubscription
from query.overload.token_budget import GenerationBudget
from query.retrieval.retrieve import FusionPolicy, Retrieval
from query.telemetry.metrics import QueryMetrics
from schemas.documents import DocumentKey
from schemas.index import StoredChunk
from schemas.queries import Citation, GeneratedAnswer, QueryRequest, QueryResponse
from schemas.search import Access, Candidates, Hit

WAIT_S = 10
READER = Access("acme")
TEXT = "You may work from another country for thirty days a year."
CHUNK = StoredChunk(
    chunk_id="a",
    tenant="acme",
    document_id="a.md",
    version=1,
    position="documents.v1-0:1",
    text=TEXT,
    text_sha256="0",
    start=0,
    end=len(TEXT),
)


class Index:
    available = True

    async def search(self, searches):
        if not self.available:
            raise IndexUnavailable("down")
        hits = (Hit("a", DocumentKey("acme", "a.md"), 1.0),)
        return [Candidates(hits, hits) for _ in searches]

    async def fetch(self, _hits):
        return {"a": CHUNK}

    async def positions(self, _tenant):
        return {0: 1}


class FakeGenerator:
    """Blocks a stream until ``may_end`` is set, and counts how streams end."""

    name = "writer"

    def __init__(self):
        self.started = self.closed = self.finished = 0
        self.may_end = asyncio.Event()
        self.error: Exception | None = None
        self.answer_text = "Thirty days [1]."
        self.citation = Citation(source=1, quote=TEXT)

    async def answer(self, *_):
        if self.error:
            raise self.error
        return GeneratedAnswer(self.answer_text, (self.citation,))

    async def stream(self, *_):
        self.started += 1
        try:
            yield AnswerPart("Thirty")
            await self.may_end.wait()
            if self.error:
                raise self.error
            yield AnswerPart(" days [1].", (self.citation,))
            yield Written(GeneratedAnswer(self.answer_text, (self.citation,)), 40, 5)
            self.finished += 1
        finally:
            self.closed += 1


class Service:
    def __init__(self, tokens_per_minute=0, cache=None):
        self.registry = CollectorRegistry()
        metrics, self.cache, self.index, self.generator = (
            QueryMetrics(self.registry),
            cache or MemoryAnswerCache(),
            Index(),
            FakeGenerator(),
        )
        near = NearCache(slices=self.cache.count, max_bytes=0)
        freshness = FreshnessReader(
            FreshnessSources(self.cache, near, self.index, InvalidationSubscription(self.cache)),
            metrics=metrics,
            wait_s=1,
        )
        self.retrieval = Retrieval(
            index=self.index,
            embedder=HashingEmbedder(8),
            metrics=metrics,
            policy=FusionPolicy(candidates=10, kept=10, rrf_k=60),
        )
        fill = AnswerFill(
            freshness=freshness,
            retrieval=self.retrieval,
            generator=self.generator,
            store=AnswerStore(self.cache, ttl_s=60),
            metrics=metrics,
            budget=GenerationBudget(tokens_per_minute=tokens_per_minute, tokens_per_answer=100),
        )
        maker = AnswerMaker("g1", "hashing", "writer", "rrf")
        self.answers = AnswerService(freshness=freshness, fill=fill, maker=maker, metrics=metrics)
        self.streams = AnswerStreams(
            answers=self.answers, fill=fill, generator=self.generator, metrics=metrics, idle_s=0.02
        )

    async def begin(self, query="days?"):
        return await self.streams.begin(QueryRequest(query=query), READER)

    async def collect(self, query="days?"):
        async with asyncio.timeout(WAIT_S):
            events = [event async for event in await self.begin(query) if event is not None]
        return [(event.name, json.loads(event.data)) for event in events]

    async def ask(self, query="days?"):
        answer = await self.answers.answer(QueryRequest(query=query, generate=True), READER)
        return QueryResponse.model_validate_json(answer)

    def count(self, name, **labels):
        return self.registry.get_sample_value(name, labels) or 0


@pytest.fixture
async def service():
    service = Service()
    yield service
    await service.streams.close()
    await service.answers.close()


async def named(events, name):
    """Data of the next event with this name."""
    async with asyncio.timeout(WAIT_S):
        async for event in events:
            if event is not None and event.name == name:
                return json.loads(event.data)
    raise AssertionError(name)


async def until(condition):
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - no event to await
            await asyncio.sleep(0)


async def test_sources_are_first_and_done_is_last(service):
    service.generator.may_end.set()
    events = await service.collect()
    assert [name for name, _ in events] == ["sources", "token", "token", "citation", "usage", "as_of", "done"]
    by_name = dict(events)
    assert by_name["sources"]["results"][0]["text"] == TEXT
    assert "".join(data["text"] for name, data in events if name == "token") == "Thirty days [1]."
    assert by_name["citation"] == {"source": 1, "quote": TEXT}
    assert by_name["usage"] == {"input_tokens": 40, "output_tokens": 5}
    assert by_name["as_of"]["positions"] == {"0": 1}
    assert by_name["done"]["cached"] is False
    assert service.count("freshline_generation_tokens_total", direction="input") == 40


async def test_sources_are_sent_before_the_text_is_complete(service):
    async with aclosing(await service.begin()) as events:
        assert (await named(events, "sources"))["results"]
        assert (await named(events, "token")) == {"text": "Thirty"}
        assert service.generator.finished == 0
        service.generator.may_end.set()
        await named(events, "done")


async def test_an_idle_stream_sends_keep_alives(service):
    async with aclosing(await service.begin()) as events, asyncio.timeout(WAIT_S):
        while await anext(events) is not None:
            pass
        service.generator.may_end.set()
        await named(events, "done")


async def test_a_finished_stream_is_cached_for_both_apis(service):
    service.generator.may_end.set()
    first = await service.collect()
    second = await service.collect("  DAYS? ")
    assert dict(second)["done"]["cached"] is True
    assert dict(second)["usage"] == {"input_tokens": 0, "output_tokens": 0}
    assert dict(second)["sources"] == dict(first)["sources"]
    assert [data["text"] for name, data in second if name == "token"] == ["Thirty days [1]."]
    whole = await service.ask()
    assert (whole.cached, whole.answer, whole.citations) == (True, "Thirty days [1].", (service.generator.citation,))
    assert service.generator.started == 1


async def test_a_fill_that_lost_the_epoch_race_is_stored_if_its_sources_are_the_same(service):
    service.generator.may_end.set()
    await service.collect()
    await service.cache.apply("acme", {0: 2}, drop=True)
    service.generator.may_end.clear()
    async with aclosing(await service.begin()) as events:
        await named(events, "token")
        await service.cache.apply("acme", {0: 3}, drop=True)
        service.generator.may_end.set()
        assert (await named(events, "as_of"))["positions"] == {"0": 2}
    events = await service.collect()
    assert dict(events)["done"]["cached"] is True
    assert service.generator.started == 2


async def test_concurrent_equal_questions_share_one_generation_and_receive_all_events(service):
    async with aclosing(await service.begin()) as first:
        await named(first, "token")
        second = asyncio.create_task(service.collect("DAYS?"))
        service.generator.may_end.set()
        events = await second
        await named(first, "done")
    assert [data["text"] for name, data in events if name == "token"] == ["Thirty", " days [1]."]
    assert service.generator.started == 1


@pytest.fixture
async def queued(service, monkeypatch):
    """A stream whose question is queued, and the event that admits it."""
    monkeypatch.setattr("query.cache.freshness.MAX_READ_AGE_MS", -1.0)
    retrieval = service.retrieval
    admit, is_queued, vector = asyncio.Event(), asyncio.Event(), retrieval._vector

    async def blocked(question):
        is_queued.set()
        await admit.wait()
        return await vector(question)

    monkeypatch.setattr(retrieval, "_vector", blocked)
    service.generator.may_end.set()
    collecting = asyncio.create_task(service.collect())
    await is_queued.wait()
    yield collecting, admit
    admit.set()
    await collecting


async def test_a_stream_reflects_the_positions_at_the_start_of_its_search_and_is_shared_until_then(service, queued):
    collecting, admit = queued
    await service.cache.apply("acme", {0: 2}, drop=True)
    later = asyncio.create_task(service.collect())
    await asyncio.sleep(0)
    admit.set()
    for events in (await collecting, await later):
        assert dict(events)["as_of"]["positions"] == {"0": 2}
        assert dict(events)["done"]["cached"] is False
    assert service.generator.started == 1
    assert dict(await service.collect())["done"]["cached"] is True


async def test_a_stream_whose_answer_is_cached_while_queued_is_not_generated(service, queued):
    collecting, admit = queued
    other = Service(cache=service.cache)
    await other.ask()
    admit.set()
    events = dict(await collecting)
    assert (events["done"]["cached"], events["usage"]["output_tokens"], service.generator.started) == (True, 0, 0)
    await other.answers.close()


async def test_the_generation_is_cancelled_with_its_last_reader_and_nothing_is_stored(service):
    first, second = await service.begin(), await service.begin()
    await named(first, "token")
    await named(second, "token")
    await first.aclose()
    await asyncio.sleep(0)
    assert service.generator.closed == 0
    await second.aclose()
    await until(lambda: service.generator.closed == 1)
    assert service.generator.finished == 0
    assert service.count("freshline_answers_abandoned_total") == 1
    service.generator.may_end.set()
    assert dict(await service.collect())["done"]["cached"] is False


@pytest.mark.parametrize(
    ("error", "reason"), [(GenerationError("down"), "failed"), (GenerationThrottled("busy", retry_after_s=1), "busy")]
)
async def test_a_failed_generation_is_reported_after_the_sources(service, error, reason):
    service.generator.error = error
    service.generator.may_end.set()
    events = await service.collect()
    assert [name for name, _ in events] == ["sources", "token", "unanswered", "as_of", "done"]
    assert dict(events)["unanswered"] == {"reason": reason}
    whole = await service.ask()
    assert (whole.answer, whole.unanswered, [result.text for result in whole.results]) == (None, reason, [TEXT])
    assert service.count("freshline_generation_failures_total", reason=reason) == 2
    service.generator.error = None
    whole = await service.ask()  # neither answer was stored
    assert (whole.cached, whole.answer, whole.unanswered) == (False, "Thirty days [1].", None)


async def test_a_tenant_without_token_budget_gets_sources_and_cached_answers():
    service = Service(tokens_per_minute=200)
    service.generator.may_end.set()
    await service.collect("one")
    assert (await service.ask("two")).answer == "Thirty days [1]."
    events = await service.collect("three")
    assert dict(events)["unanswered"] == {"reason": "limited"}
    assert dict(events)["sources"]["results"]
    assert (await service.ask("four")).unanswered == "limited"
    assert (await service.ask("one")).cached
    assert service.generator.started == 1
    await service.streams.close()
    await service.answers.close()


async def test_a_failure_before_the_first_event_is_raised(service):
    service.index.available = False
    with pytest.raises(IndexUnavailable):
        await service.begin()
    service.index.available = True
    service.generator.may_end.set()
    assert dict(await service.collect())["done"]


async def test_a_broadcast_raises_its_error_to_every_reader():
    async def failing():
        yield 1
        raise RuntimeError("broken")

    closed = []
    broadcast = Broadcast(failing(), on_closed=lambda: closed.append(1), on_abandoned=closed.clear)
    for _ in range(2):
        reader = broadcast.read()
        assert await anext(reader) == 1
        with pytest.raises(RuntimeError):
            await anext(reader)
    assert closed
