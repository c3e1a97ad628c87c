"""Answers as events: their order, who shares them, what is kept, and what ends with whoever goes away."""

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
from query.answers.stream import AnswerStreams
from query.cache.freshness import FreshnessReader
from query.cache.key import AnswerMaker
from query.cache.near_cache import NearCache
from query.cache.subscription import InvalidationSubscription
from query.overload.token_budget import GenerationBudget
from query.retrieval.retrieve import Retrieval
from query.telemetry.metrics import QueryMetrics
from schemas.documents import DocumentKey
from schemas.index import StoredChunk
from schemas.queries import Citation, GeneratedAnswer, QueryRequest, QueryResponse
from schemas.search import Access, Hit, Windows

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
            raise IndexUnavailable("away")
        hits = (Hit("a", DocumentKey("acme", "a.md"), 1.0),)
        return [Windows(hits, hits) for _ in searches]

    async def fetch(self, _hits):
        return {"a": CHUNK}

    async def positions(self, _tenant):
        return {0: 1}


class Writer:
    """A generator that writes when it is let, and notes how it ended."""

    name = "writer"

    def __init__(self):
        self.begun = self.closed = self.finished = 0
        self.may_end = asyncio.Event()
        self.error: Exception | None = None
        self.answer_text = "Thirty days [1]."
        self.citation = Citation(source=1, quote=TEXT)

    async def answer(self, *_):
        if self.error:
            raise self.error
        return GeneratedAnswer(self.answer_text, (self.citation,))

    async def stream(self, *_):
        self.begun += 1
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
        metrics, self.cache, self.index, self.writer = (
            QueryMetrics(self.registry),
            cache or MemoryAnswerCache(),
            Index(),
            Writer(),
        )
        self.answering = AnswerService(
            freshness=FreshnessReader(
                cache=self.cache,
                near=NearCache(slices=self.cache.count, max_bytes=0),
                index=self.index,
                watch=InvalidationSubscription(self.cache),
                metrics=metrics,
                wait_s=1,
            ),
            retrieval=Retrieval(
                index=self.index, embedder=HashingEmbedder(8), metrics=metrics, window=10, kept=10, rrf_k=60
            ),
            generator=self.writer,
            cache=self.cache,
            maker=AnswerMaker("g1", "hashing", "writer", "rrf"),
            metrics=metrics,
            ttl_s=60,
            budget=GenerationBudget(tokens_per_minute=tokens_per_minute, tokens_per_answer=100),
        )
        self.streamed = AnswerStreams(answering=self.answering, generator=self.writer, metrics=metrics, idle_s=0.02)

    async def begin(self, query="days?"):
        return await self.streamed.begin(QueryRequest(query=query), READER)

    async def told(self, query="days?"):
        async with asyncio.timeout(WAIT_S):
            events = [event async for event in await self.begin(query) if event is not None]
        return [(event.name, json.loads(event.data)) for event in events]

    async def ask(self, query="days?"):
        answer = await self.answering.answer(QueryRequest(query=query, generate=True), READER)
        return QueryResponse.model_validate_json(answer)

    def count(self, name, **labels):
        return self.registry.get_sample_value(name, labels) or 0


@pytest.fixture
async def service():
    service = Service()
    yield service
    await service.streamed.close()
    await service.answering.close()


async def named(events, name):
    """Read until an event of this name."""
    async with asyncio.timeout(WAIT_S):
        async for event in events:
            if event is not None and event.name == name:
                return json.loads(event.data)
    raise AssertionError(name)


async def until(condition):
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for lies inside the parts and has no event
            await asyncio.sleep(0)


async def test_sources_come_first_and_done_comes_last(service):
    service.writer.may_end.set()
    told = await service.told()
    assert [name for name, _ in told] == ["sources", "token", "token", "citation", "usage", "as_of", "done"]
    by_name = dict(told)
    assert by_name["sources"]["results"][0]["text"] == TEXT
    assert "".join(data["text"] for name, data in told if name == "token") == "Thirty days [1]."
    assert by_name["citation"] == {"source": 1, "quote": TEXT}
    assert by_name["usage"] == {"input_tokens": 40, "output_tokens": 5}
    assert by_name["as_of"]["positions"] == {"0": 1}
    assert by_name["done"]["cached"] is False
    assert service.count("freshline_generation_tokens_total", direction="input") == 40


async def test_sources_are_told_before_anything_is_written(service):
    async with aclosing(await service.begin()) as events:
        assert (await named(events, "sources"))["results"]
        assert (await named(events, "token")) == {"text": "Thirty"}
        assert service.writer.finished == 0
        service.writer.may_end.set()
        await named(events, "done")


async def test_a_stream_that_waits_shows_signs_of_life(service):
    async with aclosing(await service.begin()) as events, asyncio.timeout(WAIT_S):
        while await anext(events) is not None:
            pass
        service.writer.may_end.set()
        await named(events, "done")


async def test_a_finished_stream_is_cached_for_both_kinds_of_question(service):
    service.writer.may_end.set()
    first = await service.told()
    second = await service.told("  DAYS? ")
    assert dict(second)["done"]["cached"] is True
    assert dict(second)["usage"] == {"input_tokens": 0, "output_tokens": 0}
    assert dict(second)["sources"] == dict(first)["sources"]
    assert [data["text"] for name, data in second if name == "token"] == ["Thirty days [1]."]
    whole = await service.ask()
    assert (whole.cached, whole.answer, whole.citations) == (True, "Thirty days [1].", (service.writer.citation,))
    assert service.writer.begun == 1


async def test_a_change_drops_it_and_one_that_comes_meanwhile_does_not_if_the_sources_are_the_same(service):
    service.writer.may_end.set()
    await service.told()
    await service.cache.apply("acme", {0: 2}, drop=True)
    service.writer.may_end.clear()
    async with aclosing(await service.begin()) as events:
        await named(events, "token")
        await service.cache.apply("acme", {0: 3}, drop=True)
        service.writer.may_end.set()
        assert (await named(events, "as_of"))["positions"] == {"0": 2}
    told = await service.told()
    assert dict(told)["done"]["cached"] is True
    assert service.writer.begun == 2


async def test_equal_questions_at_a_time_are_written_once_and_all_get_everything(service):
    async with aclosing(await service.begin()) as early:
        await named(early, "token")
        late = asyncio.create_task(service.told("DAYS?"))
        service.writer.may_end.set()
        told = await late
        await named(early, "done")
    assert [data["text"] for name, data in told if name == "token"] == ["Thirty", " days [1]."]
    assert service.writer.begun == 1


@pytest.fixture
async def waiting(service, monkeypatch):
    """A stream whose question waits for its turn, and what lets it go on."""
    monkeypatch.setattr("query.cache.freshness.LOOK_STANDS_MS", -1.0)
    retrieval = service.answering._retrieval
    turn, waits, vector = asyncio.Event(), asyncio.Event(), retrieval._vector

    async def held(question):
        waits.set()
        await turn.wait()
        return await vector(question)

    monkeypatch.setattr(retrieval, "_vector", held)
    service.writer.may_end.set()
    telling = asyncio.create_task(service.told())
    await waits.wait()
    yield telling, turn
    turn.set()
    await telling


async def test_a_stream_is_true_for_the_moment_in_which_its_search_begins_and_others_share_it_until_then(
    service, waiting
):
    telling, turn = waiting
    await service.cache.apply("acme", {0: 2}, drop=True)
    later = asyncio.create_task(service.told())
    await asyncio.sleep(0)
    turn.set()
    for told in (await telling, await later):
        assert dict(told)["as_of"]["positions"] == {"0": 2}
        assert dict(told)["done"]["cached"] is False
    assert service.writer.begun == 1
    assert dict(await service.told())["done"]["cached"] is True


async def test_a_stream_whose_answer_is_cached_by_its_turn_is_not_written(service, waiting):
    telling, turn = waiting
    other = Service(cache=service.cache)
    await other.ask()
    turn.set()
    told = dict(await telling)
    assert (told["done"]["cached"], told["usage"]["output_tokens"], service.writer.begun) == (True, 0, 0)
    await other.answering.close()


async def test_the_work_ends_with_its_last_reader_and_nothing_is_kept(service):
    first, second = await service.begin(), await service.begin()
    await named(first, "token")
    await named(second, "token")
    await first.aclose()
    await asyncio.sleep(0)
    assert service.writer.closed == 0
    await second.aclose()
    await until(lambda: service.writer.closed == 1)
    assert service.writer.finished == 0
    assert service.count("freshline_answers_abandoned_total") == 1
    service.writer.may_end.set()
    assert dict(await service.told())["done"]["cached"] is False


@pytest.mark.parametrize(
    ("error", "reason"), [(GenerationError("down"), "failed"), (GenerationThrottled("busy", retry_after_s=1), "busy")]
)
async def test_a_generator_that_fails_leaves_the_sources_and_is_told_of(service, error, reason):
    service.writer.error = error
    service.writer.may_end.set()
    told = await service.told()
    assert [name for name, _ in told] == ["sources", "token", "unanswered", "as_of", "done"]
    assert dict(told)["unanswered"] == {"reason": reason}
    whole = await service.ask()
    assert (whole.answer, whole.unanswered, [result.text for result in whole.results]) == (None, reason, [TEXT])
    assert service.count("freshline_generation_failures_total", reason=reason) == 2
    service.writer.error = None
    whole = await service.ask()  # neither was kept
    assert (whole.cached, whole.answer, whole.unanswered) == (False, "Thirty days [1].", None)


async def test_a_tenant_without_tokens_gets_the_sources_and_cached_answers():
    service = Service(tokens_per_minute=200)
    service.writer.may_end.set()
    await service.told("one")
    assert (await service.ask("two")).answer == "Thirty days [1]."
    told = await service.told("three")
    assert dict(told)["unanswered"] == {"reason": "limited"}
    assert dict(told)["sources"]["results"]
    assert (await service.ask("four")).unanswered == "limited"
    assert (await service.ask("one")).cached
    assert service.writer.begun == 1
    await service.streamed.close()
    await service.answering.close()


async def test_what_fails_before_the_first_event_is_raised(service):
    service.index.available = False
    with pytest.raises(IndexUnavailable):
        await service.begin()
    service.index.available = True
    service.writer.may_end.set()
    assert dict(await service.told())["done"]


async def test_a_broadcast_gives_its_error_to_every_reader():
    async def failing():
        yield 1
        raise RuntimeError("broken")

    forgotten = []
    broadcast = Broadcast(failing(), forget=lambda: forgotten.append(1), abandoned=forgotten.clear)
    for _ in range(2):
        reader = broadcast.read()
        assert await anext(reader) == 1
        with pytest.raises(RuntimeError):
            await anext(reader)
    assert forgotten
