"""The fast path and the application send the same bytes, for any request in any segmentation."""

import asyncio
import json
import re
import time
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from infra.opensearch.port import IndexUnavailable
from infra.redis.port import Lookup
from infra.settings import HttpSettings, Settings, TenantSettings
from infra.web.credentials import Credentials
from infra.web.inline_responder import InlineResponder
from infra.web.metrics import http_seconds
from infra.web.server import listening
from query.answers.response import stamped
from query.api.app import ApiPolicy, ApiServices, ApiTelemetry, build_app, question_limit
from query.api.fast_path import URLS, FastPath, Gate, QuestionKeys, counted_in
from query.api.hit_counts import HitCounts
from query.cache.key import AnswerMaker, cache_key
from query.cache.near_cache import NearCache
from query.operations.endpoints import Operations
from query.telemetry.metrics import QueryMetrics
from query.telemetry.rolling_stats import RollingStats
from schemas.positions import AsOf
from schemas.queries import QueryRequest
from schemas.search import Access

KEY = "fl-test-key"
MAKER = AnswerMaker("g1", "model", "extractive", "rrf")
QUESTIONS = ("days off", "Wie viele Tage? ä", "x" * 40)
CACHED = QUESTIONS[:2]


class Answers:
    """An AnswerService that serves near-cache hits only."""

    def __init__(self, near):
        self.near = near
        self.asked = 0
        self.release = asyncio.Event()
        self.release.set()

    async def answer(self, request, access):
        self.asked += 1
        await self.release.wait()
        hit = self.near.get(cache_key(request, access, MAKER))
        if hit is None:
            raise IndexUnavailable("not cached")
        as_of = AsOf.model_construct(positions=hit.positions, checked_ms=hit.checked_ms)
        return stamped(hit.body, query_time_ms=1.0, cached=True, as_of=as_of)


def near_with(questions):
    near = NearCache(slices=1, max_bytes=1_000_000, monotonic_s=lambda: 5.0, now_ms=lambda: 1_000.0)
    near.on_subscribed()
    near.on_heartbeat(5.0)
    for number, question in enumerate(questions):
        put(near, question, number)
    return near


def put(near, question, number):
    key = cache_key(QueryRequest(query=question), Access("local"), MAKER)
    body = json.dumps({"results": [], "answer": question, "citations": None, "unanswered": None}).encode()
    lookup = Lookup(1, {3: number}, b"", seeded=True, sequence=0, ttl_ms=60_000)
    assert near.put("local", key, lookup, body, read_s=5.0)


class Cached:
    """Answers in the near cache; hits from Redis and heartbeats are hooks of the test."""

    def __init__(self, near, redis, heartbeat):
        self._near, self._redis, self._heartbeat = near, redis, heartbeat

    def near_hit(self, _tenant, key):
        return self._near.get(key)

    async def redis_hit(self, tenant, key):
        return await self._redis(tenant, key) if self._redis else None

    async def await_heartbeat(self, tenant, key):
        return await self._heartbeat(tenant, key) if self._heartbeat else False


@asynccontextmanager
async def serving(near, *, fast, key=None, per_s=0, answers=None, at_capacity=None, redis=None, heartbeat=None):
    """A server with or without the fast path; yields its port."""
    settings = Settings(tenant=TenantSettings(api_key=SecretStr(key) if key else None))
    registry = CollectorRegistry()
    metrics, seconds = QueryMetrics(registry), http_seconds(registry)
    credentials, operations = Credentials(settings), Operations({}, RollingStats())
    limit = question_limit(per_s)
    app = build_app(
        ApiServices(answers or Answers(near), None, None, operations),
        ApiPolicy(credentials, limit),
        ApiTelemetry(registry, seconds),
    )
    async with AsyncExitStack() as stack:
        if fast:
            counts = HitCounts(metrics, counted_in(seconds))
            path = FastPath(
                app,
                answers=Cached(near, redis, heartbeat),
                keys=QuestionKeys(MAKER),
                gate=Gate(credentials, limit, operations),
                counts=counts,
                capacity=SimpleNamespace(is_at_capacity=at_capacity) if at_capacity else None,
            )
            listens = listening(path, HttpSettings(), settings, inline=InlineResponder(URLS, path.respond))
            stack.callback(counts.flush)
        else:
            listens = listening(app, HttpSettings(), settings)
        url = await stack.enter_async_context(listens)
        yield int(url.rpartition(":")[2]), metrics, operations


def request(path, body, headers, method="POST"):
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def exchange(port, segments, responses=1):
    """Send the segments one after the other, and read the given number of responses."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = []
    try:
        for segment in segments:
            writer.write(segment)
            await writer.drain()
            await asyncio.sleep(0)
        for _ in range(responses):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(re.search(rb"content-length: (\d+)", head)[1])
            received.append((head, await reader.readexactly(length)))
    finally:
        writer.close()
        await writer.wait_closed()
    return received


def unstamped(responses):
    """Without the fields that differ between equal answers: query time, date, and the length that depends on them."""
    return [
        (
            re.sub(rb"(date|content-length): [^\r]*\r\n", b"", head),
            re.sub(rb'"query_time_ms":[0-9.e-]+', b"", body),
        )
        for head, body in responses
    ]


BODIES = st.one_of(
    st.sampled_from(QUESTIONS).map(lambda question: json.dumps({"query": question}).encode()),
    st.sampled_from(QUESTIONS).map(lambda question: json.dumps({"query": f" {question.upper()} "}).encode()),
    st.sampled_from(
        (
            b"",
            b"{",
            b"[]",
            b'{"query":""}',
            b'{"query":"days off","top_k":99}',
            b'{"query":"days off","generate":true}',
            b'{"query":"days off","min_position":"documents.v1-3:0"}',
            b'{"query":"days off","tenant":"umbrella"}',
            b'{"query":"\\ud800"}',
            b'{"query":"' + b"y" * 17_000 + b'"}',
        )
    ),
)
CREDENTIALS = st.sampled_from(
    (
        (),
        (("Authorization", f"Bearer {KEY}"),),
        (("X-API-Key", KEY),),
        (("Authorization", "Bearer wrong"),),
        (("Authorization", f"Basic {KEY}"),),
        (("Authorization", f"bearer  {KEY} "), ("X-API-Key", "wrong")),
    )
)
TYPES = st.sampled_from(("application/json", "application/json; charset=utf-8", "text/plain", "APPLICATION/JSON"))
PATHS = st.sampled_from(("/v1/query", "/query", "/v1/query?x=1", "/v1/queries"))


@examples(max_examples=12, deadline=None)
@given(
    asked=st.lists(st.tuples(PATHS, BODIES, CREDENTIALS, TYPES, st.integers(1, 5)), min_size=1, max_size=12),
    key=st.sampled_from((None, KEY)),
)
def test_fast_path_and_application_send_the_same_bytes(asked, key):
    async def compare():
        near = near_with(CACHED)
        async with serving(near, fast=True, key=key) as fast, serving(near, fast=False, key=key) as application:
            for path, body, credentials, kind, parts in asked:
                sent = request(path, body, [*credentials, ("Content-Type", kind)])
                size = -(-len(sent) // parts)
                segments = [sent[at : at + size] for at in range(0, len(sent), size)]
                both = [unstamped(await exchange(server[0], segments)) for server in (fast, application)]
                assert both[0] == both[1]

    asyncio.run(compare())


async def test_hits_bypass_the_application_and_are_counted():
    near = near_with(CACHED)
    answers = Answers(near)
    async with serving(near, fast=True, answers=answers) as (port, metrics, _):
        sent = request("/v1/query", json.dumps({"query": CACHED[0]}).encode(), [("Content-Type", "application/json")])
        for _ in range(3):
            [(head, body)] = await exchange(port, [sent])
            assert head.startswith(b"HTTP/1.1 200 OK\r\ndate: ")
            assert (json.loads(body)["answer"], json.loads(body)["cached"]) == (CACHED[0], True)
        async with asyncio.timeout(10):
            while metrics.queries.labels("hit")._value.get() < 3:  # noqa: ASYNC110 - counts are flushed with a delay
                await asyncio.sleep(0.01)
    assert answers.asked == 0


async def test_pipelined_requests_are_answered_in_order():
    near = near_with(CACHED)
    bodies = [json.dumps({"query": question}).encode() for question in (*CACHED, QUESTIONS[2], CACHED[0])]
    sent = b"".join(request("/v1/query", body, [("Content-Type", "application/json")]) for body in bodies)
    async with serving(near, fast=True) as (port, _, _), serving(near, fast=False) as (application, _, _):
        responses = await exchange(port, [sent], responses=4)
        assert [head.split()[1] for head, _ in responses] == [b"200", b"200", b"503", b"200"]
        assert [json.loads(body).get("answer") for _, body in responses] == [*CACHED, None, CACHED[0]]
        assert unstamped(responses) == unstamped(await exchange(application, [sent], responses=4))


async def test_equal_questions_wait_for_the_first_and_hit_its_answer():
    near = near_with(())
    answers = Answers(near)
    answers.release.clear()
    async with serving(near, fast=True, answers=answers) as (port, _, _):
        sent = request("/v1/query", json.dumps({"query": CACHED[0]}).encode(), [("Content-Type", "application/json")])
        asking = [asyncio.create_task(exchange(port, [sent])) for _ in range(20)]
        async with asyncio.timeout(10):
            while not answers.asked:  # noqa: ASYNC110 - no event to await
                await asyncio.sleep(0.01)
        put(near, CACHED[0], 1)
        answers.release.set()
        responses = [(await task)[0] for task in asking]
    assert {head.split()[1] for head, _ in responses} == {b"200"}
    assert answers.asked == 1


async def test_at_capacity_redis_hits_are_served_and_the_rest_is_rejected_without_the_application():
    near, answers = near_with(CACHED), Answers(near_with(QUESTIONS))
    near_elsewhere = near_with(QUESTIONS[2:])

    async def redis(_tenant, key):
        return near_elsewhere.get(key)

    async with serving(near, fast=True, answers=answers, at_capacity=lambda tenant: tenant == "local", redis=redis) as (
        port,
        metrics,
        _,
    ):
        bodies = [json.dumps({"query": question}).encode() for question in (*QUESTIONS, "uncached")]
        asked = [request("/v1/query", body, (("Content-Type", "application/json"),)) for body in bodies]
        responses = await exchange(port, asked, len(asked))
    assert [head.split()[1] for head, _ in responses] == [b"200", b"200", b"200", b"503"]
    assert json.loads(responses[2][1])["answer"] == QUESTIONS[2]
    assert b"retry-after: 1" in responses[3][0].lower()
    assert json.loads(responses[3][1])["instance"] == "/v1/query"
    assert answers.asked == 0
    assert metrics.queries.labels("hit")._value.get() == 3
    assert metrics.rolling_stats.window(60, now_s=time.monotonic()).outcomes["unavailable"] == 1


async def test_hits_wait_for_the_next_heartbeat_instead_of_reading_redis():
    """Thousands of Redis reads would delay the very heartbeat that the hits lack."""
    now_s, waiting = 5.0, asyncio.Event()
    near = NearCache(slices=1, max_bytes=1_000_000, monotonic_s=lambda: now_s, now_ms=lambda: 1_000.0)
    near.on_subscribed()
    near.on_heartbeat(5.0)
    put(near, CACHED[0], 0)
    now_s = 6.0  # no heartbeat for a second

    async def heartbeat(_tenant, key):
        if not near.lacks_heartbeat(key):
            return False
        waiting.set()
        await near.next_heartbeat()
        return True

    answers = Answers(near)
    async with serving(near, fast=True, answers=answers, heartbeat=heartbeat) as (port, _, _), asyncio.timeout(10):
        sent = request("/v1/query", json.dumps({"query": CACHED[0]}).encode(), [("Content-Type", "application/json")])
        asking = [asyncio.create_task(exchange(port, [sent])) for _ in range(50)]
        await waiting.wait()
        near.on_heartbeat(5.1)  # too old: the requests wait for the next one
        near.on_heartbeat(5.9)
        responses = [(await task)[0] for task in asking]
        assert {head.split()[1] for head, _ in responses} == {b"200"}
        assert answers.asked == 0
        # Without a subscription the near cache is empty, and there is nothing to wait for.
        now_s = 7.0
        waiting.clear()
        last = asyncio.create_task(exchange(port, [sent]))
        await waiting.wait()
        near.on_disconnected()
        [(head, _)] = await last
    assert head.split()[1] == b"503"
    assert answers.asked == 1


async def test_requests_above_the_rate_limit_are_rejected_and_counted_once(monkeypatch):
    # Freeze the clock of the rate limit: the test must not depend on the speed of the machine.
    for module in ("limits.storage.memory", "limits.strategies"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(time=lambda: 1_000.2))
    near = near_with(CACHED)
    async with serving(near, fast=True, per_s=2) as (port, _, _):
        sent = request("/v1/query", json.dumps({"query": CACHED[0]}).encode(), [("Content-Type", "application/json")])
        statuses = [(await exchange(port, [sent]))[0][0].split()[1] for _ in range(4)]
    assert statuses == [b"200", b"200", b"429", b"429"]


async def test_a_draining_process_uses_the_application_which_closes_connections():
    near = near_with(CACHED)
    async with serving(near, fast=True) as (port, _, operations):
        operations.drain()
        sent = request("/v1/query", json.dumps({"query": CACHED[0]}).encode(), [("Content-Type", "application/json")])
        [(head, _)] = await exchange(port, [sent])
    assert b"connection: close" in head


@pytest.mark.parametrize("connections", [600])
async def test_a_burst_of_connections_is_accepted(connections):
    near = near_with(CACHED)
    async with serving(near, fast=True) as (port, _, _), asyncio.timeout(30):
        sent = request("/v1/query", json.dumps({"query": CACHED[0]}).encode(), [("Content-Type", "application/json")])
        responses = await asyncio.gather(*(exchange(port, [sent] * 3, responses=3) for _ in range(connections)))
    assert {head.split()[1] for connection in responses for head, _ in connection} == {b"200"}
