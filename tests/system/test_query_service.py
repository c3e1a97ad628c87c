"""The query service over HTTP, with real OpenSearch and Redis and a real embedding model."""

import asyncio
import os
import time
from contextlib import AsyncExitStack, asynccontextmanager
from unittest import mock
from uuid import uuid4

import httpx
import pytest
from only_writer import put_over
from structlog.testing import capture_logs

from infra.embedding.factory import open_embedder
from infra.local.stack import Stack
from infra.opensearch.index import OpenSearchIndex
from infra.opensearch.port import ChunkChange, ChunkWrite
from infra.opensearch.provision import create_indices, delete_indices
from infra.redis.answers import RedisAnswerCache
from infra.redis.connect import connect_redis
from infra.settings import QuerySettings, Settings, TenantSettings
from query.main import serving
from schemas.documents import LifeState
from schemas.index import Manifest, StoredChunk
from schemas.problems import Problem
from schemas.queries import QueryResponse

pytestmark = pytest.mark.stack

WAIT_S = 20
PASSAGES = {
    "travel.md": "You may work from another country for up to thirty days a year.",
    "leave.md": "Parental leave lasts sixteen weeks and is fully paid.",
    "laptops.md": "Report a lost laptop to the security team within one hour.",
}


@pytest.fixture(scope="module")
def stack_settings(stack: Stack):
    with mock.patch.dict(os.environ, stack.environment()):
        yield Settings(
            namespace=f"query-test-{uuid4().hex[:8]}", query=QuerySettings(port=0, min_position_wait_s=WAIT_S)
        )


class Writer:
    """Writes to the stores in the order of the write path: passages, manifest, applied positions."""

    def __init__(self, index, cache, embedder):
        self.index = index
        self.cache = cache
        self.embedder = embedder
        self.offset = 0

    async def make_searchable(self, document_id, text, *, tenant="local", remove=(), **attributes):
        self.offset += 1
        chunk = StoredChunk(
            chunk_id=f"{tenant}-{document_id}-{abs(hash(text))}",
            tenant=tenant,
            document_id=document_id,
            version=self.offset,
            position=f"documents.v1-0:{self.offset}",
            text=text,
            text_sha256="0",
            start=0,
            end=len(text),
            **attributes,
        )
        [vector] = await self.embedder.embed_passages([text])
        change = ChunkChange(chunk.key, chunk.version, (ChunkWrite(chunk, vector),), tuple(remove))
        assert await self.index.apply([change]) == [None]
        manifest = Manifest(
            tenant=tenant,
            document_id=document_id,
            version=chunk.version,
            complete=True,
            state=LifeState.LIVE,
            position=chunk.position,
            profile="test",
            chunks=(chunk.chunk_id,),
            updated_ms=time.time() * 1_000,
        )
        await put_over(self.index, manifest)
        return chunk

    async def write(self, document_id, text, *, tenant="local", **more):
        chunk = await self.make_searchable(document_id, text, tenant=tenant, **more)
        await self.cache.apply(tenant, {0: self.offset}, drop=True)
        return chunk


@pytest.fixture(scope="module")
async def writer(stack_settings):
    async with AsyncExitStack() as ending:
        ending.push_async_callback(delete_indices, stack_settings)
        await create_indices(stack_settings)
        index = OpenSearchIndex.open(stack_settings)
        ending.push_async_callback(index.close)
        redis = connect_redis(stack_settings.redis)
        ending.push_async_callback(redis.aclose)
        embedder = open_embedder(stack_settings.embedding)
        ending.push_async_callback(embedder.close)
        writer = Writer(index, RedisAnswerCache(redis, stack_settings.names), embedder)
        for document_id, text in PASSAGES.items():
            await writer.write(document_id, text)
        await writer.write("umbrella.md", "At Umbrella you may work from another country for ever.", tenant="umbrella")
        yield writer
        async for key in redis.scan_iter(f"{stack_settings.namespace}:*"):
            await redis.delete(key)


@asynccontextmanager
async def service_of(settings):
    async with serving(settings) as base_url, httpx.AsyncClient(base_url=base_url, timeout=WAIT_S + 10) as client:
        yield client


@pytest.fixture(scope="module")
async def client(stack_settings, writer):  # noqa: ARG001 - the index must exist first
    async with service_of(stack_settings) as client:
        yield client


async def ask(client, query, **fields):
    response = await client.post("/v1/query", json={"query": query, **fields})
    assert response.status_code == 200, response.text
    return QueryResponse.model_validate_json(response.text)


def documents(response):
    return [result.document_id for result in response.results]


async def test_the_best_passage_is_first_with_its_span_and_an_answer(client):
    answer = await ask(client, "How long is parental leave?", generate=True)
    assert documents(answer)[0] == "leave.md"
    best = answer.results[0]
    assert (best.text, best.version, best.span) == (PASSAGES["leave.md"], 2, (0, len(PASSAGES["leave.md"])))
    assert "sixteen weeks" in answer.answer
    assert answer.citations[0].quote in answer.results[answer.citations[0].source - 1].text


async def test_an_answer_is_cached_until_a_change_and_then_reflects_it(client, writer):
    query = "How do I report a lost badge?"
    first, second = await ask(client, query), await ask(client, query)
    assert (first.cached, second.cached) == (False, True)
    assert first.results == second.results
    badge = await writer.write("badges.md", "Report a lost badge at the reception desk.")
    after = await ask(client, query, min_position=badge.position)
    assert (after.cached, documents(after)[0]) == (False, "badges.md")
    assert after.as_of.positions[0] >= writer.offset
    replaced = await writer.write("badges.md", "Badges are orange.", remove=[badge.chunk_id])
    after = await ask(client, query, min_position=replaced.position)
    assert badge.text not in [result.text for result in after.results]


async def test_min_position_waits_until_the_position_is_applied(client, writer):
    chunk = await writer.make_searchable("soup.md", "Soup of the day is served at noon.")
    waiting = asyncio.create_task(ask(client, "When is the soup?", min_position=chunk.position))
    _, pending = await asyncio.wait([waiting], timeout=0.2)
    assert pending, "answered before the position was applied"
    await writer.cache.apply("local", {0: writer.offset}, drop=True)
    applied_s = time.monotonic()
    answer = await waiting
    assert time.monotonic() - applied_s < WAIT_S / 4
    assert documents(answer)[0] == "soup.md"
    assert answer.as_of.positions[0] == writer.offset


async def test_a_position_not_reached_is_rejected_with_the_current_positions(stack_settings, writer):
    hasty = stack_settings.model_copy(update={"query": QuerySettings(port=0, min_position_wait_s=0.2)})
    async with service_of(hasty) as client:
        position = f"documents.v1-0:{writer.offset + 1_000}"
        response = await client.post("/v1/query", json={"query": "soup", "min_position": position})
    problem = Problem.model_validate_json(response.text)
    assert (response.status_code, problem.type) == (503, "/problems/position-not-reached")
    assert problem.as_of == {0: writer.offset}
    assert int(response.headers["retry-after"]) >= 1


async def test_a_tenant_finds_only_its_own_documents(client, stack_settings):
    query = "May I work from another country?"
    assert "umbrella.md" not in documents(await ask(client, query, top_k=50))
    umbrella = stack_settings.model_copy(update={"tenant": TenantSettings(default="umbrella")})
    async with service_of(umbrella) as other:
        for _ in range(2):  # retrieved, then cached
            assert documents(await ask(other, query, top_k=50)) == ["umbrella.md"]


async def test_a_passage_for_a_group_is_hidden_from_others(client, writer):
    text = "The merger with Initech is planned for May."
    await writer.write("merger.md", text, groups=("board",))
    answer = await ask(client, text, top_k=50)
    assert "merger.md" not in documents(answer)
    await writer.write("merger.md", text)
    assert documents(await ask(client, text, top_k=50))[0] == "merger.md"


async def test_both_retrievers_apply_filters(client, writer):
    await writer.write("menu-1.md", "The menu has fish.", metadata={"year": 2024, "team": "kitchen"}, title="Menu")
    await writer.write("menu-2.md", "The menu has pasta.", metadata={"year": 2025, "team": "kitchen"}, title="Menu")
    for filters, expected in (
        ({"metadata.year": 2024}, {"menu-1.md"}),
        ({"metadata.team": "kitchen"}, {"menu-1.md", "menu-2.md"}),
        ({"title": "Menu", "metadata.year": [2025, 2030]}, {"menu-2.md"}),
        ({"document_id": ["menu-1.md", "leave.md"]}, {"menu-1.md", "leave.md"}),
        ({"metadata.year": 1999}, set()),
    ):
        answer = await ask(client, "What is on the menu?", top_k=50, filters=filters)
        assert set(documents(answer)) == expected, filters


async def test_the_service_is_ready_and_shows_its_console(client):
    async with asyncio.timeout(WAIT_S):
        while (report := (await client.get("/ready")).json())["status"] != "ready":  # noqa: ASYNC110 - over HTTP
            await asyncio.sleep(0.02)
    assert set(report["dependencies"]) == {"index", "redis", "subscription", "generator", "invalidation"}
    assert "<title>Freshline</title>" in (await client.get("/")).text


@pytest.mark.usefixtures("writer")
async def test_without_redis_questions_are_answered_uncached(stack_settings):
    nowhere = stack_settings.redis.model_copy(update={"url": "redis://127.0.0.1:1/0"})
    async with service_of(stack_settings.model_copy(update={"redis": nowhere})) as client:
        for _ in range(2):
            answer = await ask(client, "How long is parental leave?")
            assert (answer.cached, documents(answer)[0]) == (False, "leave.md")
        ready = await client.get("/ready")
        assert (ready.status_code, ready.json()["status"]) == (200, "degraded")


@pytest.fixture
async def audited(stack_settings, writer):  # noqa: ARG001 - the index must exist first
    """A service that audits every cache hit."""
    every = QuerySettings(port=0, min_position_wait_s=WAIT_S, audit_sample_rate=1.0, audits_per_s=1_000.0)
    async with service_of(stack_settings.model_copy(update={"query": every})) as client:
        yield client


async def verdicts(client):
    summary = await client.get("/performance-summary")
    assert summary.status_code == 200, summary.text
    return summary.json()["audit"]["verdicts"]


async def audited_as(client, verdict, count=1):
    async with asyncio.timeout(WAIT_S):
        while (await verdicts(client))[verdict] < count:  # noqa: ASYNC110 - over HTTP
            await asyncio.sleep(0.02)


async def hit_at(client, query, offset):
    """A cache hit whose positions cover the offset."""
    async with asyncio.timeout(WAIT_S):
        while (answer := await ask(client, query)).as_of.positions.get(0, -1) < offset:  # noqa: ASYNC110 - over HTTP
            await asyncio.sleep(0.01)
    assert answer.cached
    return answer


@pytest.mark.parametrize("change", ["added", "removed"])
async def test_the_auditor_detects_an_answer_that_was_not_invalidated(audited, writer, change):
    query = f"Where do I report a lost scooter that is {change}?"
    texts = [f"Report a lost scooter that is {change} {where}." for where in ("at the gate", "to the fleet desk")]
    name = f"scooters-{change}.md"
    old = await writer.write(name, texts[0])
    assert not (await ask(audited, query)).cached
    assert (await ask(audited, query)).cached
    await audited_as(audited, "same")
    assert (await verdicts(audited))["violation"] == 0
    with capture_logs() as lines:
        # The planted mistake: positions advance without invalidation.
        if change == "added":
            new = await writer.make_searchable(f"more-{name}", texts[1])
        else:
            new = await writer.make_searchable(name, "Scooters are green.", remove=[old.chunk_id])
        await writer.cache.apply("local", {0: writer.offset}, drop=False)
        answer = await hit_at(audited, query, writer.offset)
        await audited_as(audited, "violation")
    assert texts[0] in [result.text for result in answer.results]
    violation = next(line for line in lines if line["event"] == "stale_answer_served")
    expected = (new.document_id, "added", new.position) if change == "added" else (name, "removed", new.position)
    changes = [(change["document_id"], change["change"], change["position"]) for change in violation["changes"]]
    assert expected in changes
    assert violation["staleness_ms"] > 0
    fresh, served = (
        {(chunk_id, version): ranks for chunk_id, version, ranks in violation[sources]}
        for sources in ("fresh", "served")
    )
    assert all(fresh[new.chunk_id, new.version]) if change == "added" else (old.chunk_id, old.version) not in fresh
    assert all(served[old.chunk_id, old.version])
    summary = (await audited.get("/performance-summary")).json()
    assert summary["audit"]["violation_rate"] > 0
    assert any("lacked changes that their positions cover" in reason for reason in summary["health"]["reasons"])
    metrics = (await audited.get("/metrics")).text
    assert 'freshline_audits_total{verdict="violation"} 0.0' not in metrics
    await writer.cache.apply("local", {0: writer.offset}, drop=True)  # leave no stale answer for other tests


async def test_the_auditor_detects_no_violation_while_changes_invalidate_what_they_alter(audited, writer):
    query = "Which colour are the umbrellas?"
    edits = ("red", "green", "blue", "white")
    old = None
    for number, colour in enumerate(edits, start=1):
        remove = [old.chunk_id] if old else []
        old = await writer.write("colours.md", f"The umbrellas are {colour}.", remove=remove)
        assert not (await ask(audited, query, min_position=old.position)).cached
        assert (await ask(audited, query)).cached
        await audited_as(audited, "same", number)
    # The positions of an answer do not cover changes that are searchable but not applied yet.
    await writer.make_searchable("colours-2.md", "The umbrellas are also yellow.")
    assert (await ask(audited, query)).cached
    await audited_as(audited, "newer")
    await writer.cache.apply("local", {0: writer.offset}, drop=True)
    counts = await verdicts(audited)
    assert (counts["violation"], counts["same"] >= len(edits)) == (0, True)
    assert (await audited.get("/performance-summary")).json()["audit"]["violation_rate"] == 0
