"""Many concurrent connections while documents change: answers must reflect their ``as_of``, which must be recent.

Uses one client with raw connections. Checks correctness, not speed.
"""

import asyncio
import json
import random
import socket
import sys
import time
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager

import psutil
import pytest
from only_writer import put_over

from infra.embedding.factory import open_embedder
from infra.opensearch.index import OpenSearchIndex
from infra.opensearch.port import ChunkChange, ChunkWrite
from infra.opensearch.provision import create_indices
from infra.redis.answers import RedisAnswerCache
from infra.redis.connect import connect_redis
from query.cache.near_cache import MAX_HEARTBEAT_AGE_S
from schemas.documents import LifeState
from schemas.index import Manifest, StoredChunk
from schemas.queries import QueryResponse

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

TENANT = "local"
CONNECTIONS = 200
QUESTIONS_EACH = 12
QUESTIONS = 50
CHANGE_EVERY = 240
"""Answers between changes."""
PARTITIONS = 3
LIMIT_S = 240
GROWTH_BYTES = 64_000_000
"""Allowed growth of resident memory in the second half of the load."""

ROOMS = tuple(
    f"{colour} {thing}"
    for colour in ("amber", "teal", "violet", "scarlet", "ivory")
    for thing in ("falcon", "otter", "walrus", "heron", "lynx", "badger", "beetle", "salmon", "bison", "cobra")
)
WEIGHTS = tuple(1 / rank for rank in range(1, QUESTIONS + 1))
"""Zipf distribution: the first question is asked fifty times as often as the last."""


class Library:
    """Documents that change, written to the stores in the order of the write path, with their applied state.

    Attributes:
        applied: last applied offset of each partition.
        versions: applied version of each document.
    """

    def __init__(self, index, cache, embedder):
        self._index = index
        self._cache = cache
        self._embedder = embedder
        self._one_at_a_time = asyncio.Lock()
        self._offset = 0
        self.applied: dict[int, int] = {}
        self.versions: dict[str, int] = {}
        self.changes = 0
        # Applied states with a time at which they were applied, oldest first.
        self.log: list[tuple[float, dict[int, int], dict[str, int]]] = [(0.0, {}, {})]

    async def change(self, documents):
        """Write and apply new versions of ``documents``."""
        async with self._one_at_a_time:
            chunks = [self._next_chunk(document) for document in documents]
            vectors = await self._embedder.embed_passages([chunk.text for chunk in chunks])
            changes = [
                ChunkChange(chunk.key, chunk.version, (ChunkWrite(chunk, vector),), ())
                for chunk, vector in zip(chunks, vectors, strict=True)
            ]
            assert await self._index.apply(changes) == [None] * len(chunks)
            manifests = [_manifest(chunk) for chunk in chunks]
            await put_over(self._index, *manifests)
            positions = {chunk.version % PARTITIONS: chunk.version for chunk in chunks}
            await self._cache.apply(TENANT, positions, drop=True)
            self.applied |= positions
            self.versions |= {chunk.document_id: chunk.version for chunk in chunks}
            self.changes += 1
            self.log.append((time.time() * 1_000, dict(self.applied), dict(self.versions)))

    def applied_before(self, moment_ms):
        """Positions and versions that were applied before then."""
        return next((applied, versions) for at_ms, applied, versions in reversed(self.log) if at_ms < moment_ms)

    def _next_chunk(self, document):
        self._offset += 1
        text = f"The room {document} is booked by team {self._offset}."
        return StoredChunk(
            chunk_id=f"c-{document.replace(' ', '-')}",
            tenant=TENANT,
            document_id=document,
            version=self._offset,
            position=f"documents.v1-{self._offset % PARTITIONS}:{self._offset}",
            text=text,
            text_sha256="0",
            start=0,
            end=len(text),
        )


def _manifest(chunk):
    return Manifest(
        tenant=TENANT,
        document_id=chunk.document_id,
        version=chunk.version,
        complete=True,
        state=LifeState.LIVE,
        position=chunk.position,
        profile="test",
        chunks=(chunk.chunk_id,),
        updated_ms=time.time() * 1_000,
    )


@pytest.fixture
async def library(settings):
    await create_indices(settings)
    async with AsyncExitStack() as ending:
        index = OpenSearchIndex.open(settings)
        ending.push_async_callback(index.close)
        redis = connect_redis(settings.redis)
        ending.push_async_callback(redis.aclose)
        embedder = open_embedder(settings.embedding)
        ending.push_async_callback(embedder.close)
        library = Library(index, RedisAnswerCache(redis, settings.names), embedder)
        await library.change(ROOMS)
        yield library


@asynccontextmanager
async def _query_process(monkeypatch):
    """The query service in its own process; yields the process and the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    monkeypatch.setenv("FRESHLINE_QUERY__PORT", str(address[1]))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "freshline",
        "serve",
        "query",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    reading = asyncio.create_task(process.stdout.read())
    try:
        async with asyncio.timeout(LIMIT_S):
            while not await _is_taking_connections(address):
                assert not reading.done(), f"the query service ended: {(await reading).decode()}"
                await asyncio.sleep(0.02)
        yield psutil.Process(process.pid), address
        process.terminate()
        async with asyncio.timeout(LIMIT_S):
            output = (await reading).decode()
            assert await process.wait() == 0, output
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await reading


async def _is_taking_connections(address):
    try:
        async with Connection.to(address):
            return True
    except ConnectionRefusedError:
        return False


class Connection:
    """A keep-alive HTTP connection."""

    def __init__(self, reader, writer):
        self._reader = reader
        self._writer = writer

    @classmethod
    @asynccontextmanager
    async def to(cls, address):
        reader, writer = await asyncio.open_connection(*address)
        try:
            yield cls(reader, writer)
        finally:
            writer.close()
            await writer.wait_closed()

    async def post(self, path, message):
        """Status, head in lower case and body of the response."""
        body = json.dumps(message).encode()
        self._writer.write(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length:")[2].partition("\r\n")[0])
        return int(head.split(" ", 2)[1]), head, await self._reader.readexactly(length)


class Load:
    """The questions of all connections, and results."""

    def __init__(self, library):
        self._library = library
        self._all_connected = asyncio.Barrier(CONNECTIONS)
        self.answers = 0
        self.rejected = 0
        self.served = Counter()
        self.asked = Counter()

    async def run(self, address, seed):
        """Ask all questions on all connections, each in its own random order."""
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
            for number in range(CONNECTIONS):
                group.create_task(self._ask_in_turn(address, random.Random(f"{seed}-{number}")))

    async def _ask_in_turn(self, address, rng):
        async with Connection.to(address) as connection:
            await self._all_connected.wait()
            for _ in range(QUESTIONS_EACH):
                [room] = rng.choices(ROOMS, WEIGHTS)
                await self._ask(connection, room)
                self.answers += 1
                if self.answers % CHANGE_EVERY == 0:
                    await self._library.change(rng.choices(ROOMS, WEIGHTS))

    async def _ask(self, connection, room):
        message = {"query": f"Who booked the room {room}?", "generate": True}
        while True:
            asked_ms = time.time() * 1_000
            status, head, body = await connection.post("/v1/query", message)
            if status != 503:
                break
            # An overloaded service rejects a question with the time to repeat it, as on a machine with busy cores.
            self.rejected += 1
            await asyncio.sleep(int(head.partition("\r\nretry-after:")[2].partition("\r\n")[0]))
        assert status == 200, body
        answer = QueryResponse.model_validate_json(body)
        assert answer.as_of.checked_ms > asked_ms - MAX_HEARTBEAT_AGE_S * 1_000, (
            "the answer is not proven to be current"
        )
        applied, versions = self._library.applied_before(min(asked_ms, answer.as_of.checked_ms))
        missing = {
            partition: offset
            for partition, offset in applied.items()
            if answer.as_of.positions.get(partition, -1) < offset
        }
        assert not missing, f"as_of is {answer.as_of.positions} only"
        [found] = [result for result in answer.results if result.document_id == room]
        assert found.version >= versions[room], f"older than its as_of {answer.as_of.positions}"
        assert found.text.endswith(f"team {found.version}.")
        self.served["hit" if answer.cached else "miss"] += 1
        self.asked[room] += 1


async def test_two_hundred_connections_get_fresh_answers_while_documents_change(library, monkeypatch):
    load = Load(library)
    async with _query_process(monkeypatch) as (process, address):
        await load.run(address, seed=1)
        first_bytes = process.memory_info().rss
        changes = library.changes
        await load.run(address, seed=2)
        grown_bytes = process.memory_info().rss - first_bytes
    assert load.answers == 2 * CONNECTIONS * QUESTIONS_EACH
    assert library.changes - changes >= load.answers // 2 // CHANGE_EVERY
    assert load.served["hit"] > 0 < load.served["miss"]
    assert load.asked[ROOMS[0]] > load.answers / 10
    assert grown_bytes < GROWTH_BYTES
