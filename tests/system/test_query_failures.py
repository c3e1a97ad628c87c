"""Failing stores under a running query service: hits are served, other questions are rejected immediately."""

import asyncio
import os
from contextlib import asynccontextmanager, suppress
from unittest import mock
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest

from infra.embedding.factory import open_embedder
from infra.local.stack import Stack
from infra.opensearch.index import OpenSearchIndex
from infra.opensearch.port import ChunkChange, ChunkWrite
from infra.opensearch.provision import create_indices, delete_indices
from infra.settings import QuerySettings, Settings
from query.main import serving
from schemas.index import StoredChunk

pytestmark = pytest.mark.stack

WAIT_S = 20
BULKHEAD_SLOTS = 8
TEXT = "The office opens at nine."


class StoreProxy:
    """A TCP proxy of a server that can refuse connections, or accept them and never answer.

    Attributes:
        attempts: refused connections and discarded messages.
    """

    def __init__(self, url):
        parts = urlsplit(url)
        self._target = (parts.hostname, parts.port)
        self.is_open = True
        self.is_silent = False
        self.attempts = 0
        self._writers = set()

    async def serve(self, reader, writer):
        if not self.is_open:
            self.attempts += 1
            writer.close()
            return
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        self._writers |= {writer, far_writer}
        await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))

    async def _copy(self, reader, writer):
        with suppress(OSError):
            while data := await reader.read(65_536):
                if self.is_silent:
                    self.attempts += 1
                    continue
                writer.write(data)
                await writer.drain()
        writer.close()
        self._writers.discard(writer)

    def shut(self):
        self.is_open = False
        self.drop()

    def drop(self):
        for writer in tuple(self._writers):
            writer.close()


@asynccontextmanager
async def proxy_of(url):
    proxy = StoreProxy(url)
    async with await asyncio.start_server(proxy.serve, "127.0.0.1", 0) as server:
        yield proxy, server.sockets[0].getsockname()[1]
        proxy.drop()


@pytest.fixture
async def world(stack: Stack):
    """A service that reaches its stores through proxies, and one passage."""
    with mock.patch.dict(os.environ, stack.environment()):
        direct = Settings(namespace=f"failures-{uuid4().hex[:8]}", query=QuerySettings(port=0))
    await create_indices(direct)
    index, embedder = OpenSearchIndex.open(direct), open_embedder(direct.embedding)
    chunk = StoredChunk(
        chunk_id="1",
        tenant="local",
        document_id="1.md",
        version=1,
        position="documents.v1-0:1",
        text=TEXT,
        text_sha256="0",
        start=0,
        end=len(TEXT),
    )
    [vector] = await embedder.embed_passages([TEXT])
    assert await index.apply([ChunkChange(chunk.key, 1, (ChunkWrite(chunk, vector),), ())]) == [None]
    async with proxy_of(direct.opensearch.url) as (opensearch, port), proxy_of(direct.redis.url) as (redis, redis_port):
        through = direct.model_copy(
            update={
                "opensearch": direct.opensearch.model_copy(
                    update={"url": f"http://127.0.0.1:{port}", "timeout_s": 1.0, "connections": BULKHEAD_SLOTS}
                ),
                "redis": direct.redis.model_copy(update={"url": f"redis://127.0.0.1:{redis_port}/0", "timeout_s": 5.0}),
            }
        )
        async with serving(through) as url, httpx.AsyncClient(base_url=url, timeout=WAIT_S) as client:
            yield client, opensearch, redis
    await embedder.close()
    await index.close()
    await delete_indices(direct)


async def ask(client, query):
    return await client.post("/v1/query", json={"query": query})


async def recovers(client):
    async with asyncio.timeout(WAIT_S):
        number = 0
        while (await ask(client, f"a question never asked before {number}")).status_code != 200:
            number += 1
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("how", ["refused", "silent"])
async def test_without_opensearch_hits_are_served_and_misses_are_rejected_immediately(world, how):
    client, opensearch, _ = world
    assert (await ask(client, "When does it open?")).json()["cached"] is False
    if how == "refused":
        opensearch.shut()
    else:
        opensearch.is_silent = True
    new = [f"new question {number}" for number in range(24)]
    for start in range(0, len(new), BULKHEAD_SLOTS):  # opens the circuit breaker, and embeds the questions
        await asyncio.gather(*(ask(client, question) for question in new[start : start + BULKHEAD_SLOTS]))

    attempts = opensearch.attempts
    answers = await asyncio.gather(*(ask(client, question) for question in new))
    assert {answer.status_code for answer in answers} == {503}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
    # Without a circuit breaker, each question attempts a search. An open one admits a probe from time to time.
    assert opensearch.attempts - attempts < len(new) / 2
    for _ in range(20):
        hit = await ask(client, "When does it open?")
        assert (hit.status_code, hit.json()["cached"], hit.json()["results"][0]["text"]) == (200, True, TEXT)
    assert 'freshline_circuit_breaker_open{store="index"} 1.0' in (await client.get("/metrics")).text

    opensearch.is_open, opensearch.is_silent = True, False
    opensearch.drop()
    await recovers(client)


async def test_without_redis_every_question_is_answered_uncached(world):
    client, _, redis = world
    redis.shut()
    for number in range(12):
        answer = await ask(client, f"When does it open? {number % 2}")
        assert (answer.status_code, answer.json()["cached"]) == (200, False)
    redis.is_open = True
    async with asyncio.timeout(WAIT_S):
        while not (await ask(client, "When does it open?")).json()["cached"]:  # noqa: ASYNC110 - over HTTP
            await asyncio.sleep(0.05)
