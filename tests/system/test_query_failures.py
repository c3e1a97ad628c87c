"""Stores that go away under a running query service: what is cached goes on, the rest is refused at once."""

import asyncio
import os
import time
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
PLACES = 8
TEXT = "The office opens at nine."


class Way:
    """A TCP connection to a server that can be shut, or made to swallow everything."""

    def __init__(self, url):
        parts = urlsplit(url)
        self._target = (parts.hostname, parts.port)
        self.is_open = True
        self.is_silent = False
        self._writers = set()

    async def serve(self, reader, writer):
        if not self.is_open:
            writer.close()
            return
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        self._writers |= {writer, far_writer}
        await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))

    async def _copy(self, reader, writer):
        with suppress(OSError):
            while data := await reader.read(65_536):
                if not self.is_silent:
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
async def way_to(url):
    way = Way(url)
    async with await asyncio.start_server(way.serve, "127.0.0.1", 0) as server:
        yield way, server.sockets[0].getsockname()[1]
        way.drop()


@pytest.fixture
async def world(stack: Stack):
    """A service whose ways to its stores are ours, and one passage."""
    with mock.patch.dict(os.environ, stack.environment()):
        told = Settings(namespace=f"failures-{uuid4().hex[:8]}", query=QuerySettings(port=0))
    await create_indices(told)
    index, embedder = OpenSearchIndex.open(told), open_embedder(told.embedding)
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
    async with way_to(told.opensearch.url) as (opensearch, port), way_to(told.redis.url) as (redis, redis_port):
        through = told.model_copy(
            update={
                "opensearch": told.opensearch.model_copy(
                    update={"url": f"http://127.0.0.1:{port}", "timeout_s": 1.0, "connections": PLACES}
                ),
                "redis": told.redis.model_copy(update={"url": f"redis://127.0.0.1:{redis_port}/0", "timeout_s": 5.0}),
            }
        )
        async with serving(through) as url, httpx.AsyncClient(base_url=url, timeout=WAIT_S) as client:
            yield client, opensearch, redis
    await embedder.close()
    await index.close()
    await delete_indices(told)


async def ask(client, query):
    return await client.post("/v1/query", json={"query": query})


async def recovers(client):
    async with asyncio.timeout(WAIT_S):
        number = 0
        while (await ask(client, f"a question never asked before {number}")).status_code != 200:
            number += 1
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("how", ["refused", "silent"])
async def test_without_opensearch_hits_go_on_and_misses_are_refused_at_once(world, how):
    client, opensearch, _ = world
    assert (await ask(client, "When does it open?")).json()["cached"] is False
    if how == "refused":
        opensearch.shut()
    else:
        opensearch.is_silent = True
    new = [f"new question {number}" for number in range(24)]
    for start in range(0, len(new), PLACES):  # the breaker has seen enough; and the questions are embedded
        await asyncio.gather(*(ask(client, question) for question in new[start : start + PLACES]))

    began_s = time.monotonic()
    answers = await asyncio.gather(*(ask(client, question) for question in new))
    took_s = time.monotonic() - began_s
    assert {answer.status_code for answer in answers} == {503}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
    assert took_s < 2  # without a breaker, three seconds where nothing answers
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
