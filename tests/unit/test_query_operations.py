"""What a process tells of itself: windows, scores, health, readiness, the end of connections."""

import httpx
import orjson
import pytest
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from infra.opensearch.port import IndexUnavailable
from infra.redis.memory_answers import MemoryAnswerCache
from infra.settings import Settings, TenantSettings
from infra.web.credentials import Credentials
from query.api.app import build_app
from query.cache.invalidation_lag import (
    GIVE_UP_S,
    OBJECTIVE_S,
    InvalidationLag,
    InvalidationLagMonitor,
    InvalidationLags,
)
from query.operations.endpoints import Operations, Part
from query.operations.health import PartState, health
from query.telemetry.audit_verdicts import Verdict
from query.telemetry.metrics import QueryMetrics
from query.telemetry.rolling_stats import LONGEST_S, Ended, RollingStats, Served, Tally
from schemas.operations import PerformanceSummary
from schemas.positions import AsOf
from schemas.queries import QueryResponse

WELL = PartState(needed=True, fault=None)


def test_a_window_counts_what_is_in_it_and_nothing_else():
    recent = RollingStats()
    for second in range(100):
        recent.note_end(Ended.ANSWERED, 10.0, now_s=second)
        recent.note_served(Served.HIT if second % 2 else Served.FILLED, 1.0, now_s=second)
    window = recent.window(10, now_s=99.9)
    assert (window.requests, window.served[Served.HIT], window.served[Served.FILLED]) == (10, 5, 5)
    assert recent.window(LONGEST_S, now_s=99).requests == 100
    assert recent.window(10, now_s=108).requests == 1
    assert recent.window(10, now_s=200).requests == 0
    assert recent.window(10, now_s=200).hit_share is None


def test_an_hour_later_a_second_is_counted_anew():
    recent = RollingStats()
    recent.note_end(Ended.ANSWERED, 10.0, now_s=5)
    recent.note_end(Ended.INTERNAL, 10.0, now_s=5 + LONGEST_S)
    window = recent.window(LONGEST_S, now_s=5 + LONGEST_S)
    assert (window.requests, window.ended[Ended.INTERNAL], window.times.mean_ms) == (1, 1, 0.0)


def test_percentiles_are_off_by_a_twentieth_at_most():
    recent = RollingStats()
    for number in range(1, 10_001):
        recent.note_end(Ended.ANSWERED, number / 10, now_s=number % 50)
    times = recent.window(60, now_s=50).times
    assert times.mean_ms == pytest.approx(500.05)
    for found, exact in ((times.p50_ms, 500), (times.p95_ms, 950), (times.p99_ms, 990)):
        assert found == pytest.approx(exact, rel=0.05)


def busy(*, first_ms):
    recent = RollingStats()
    for number in range(100):
        recent.note_end(Ended.ANSWERED, first_ms + number, now_s=1)
        recent.note_served(Served.HIT, 5.0, now_s=1)
        recent.note_audited(Verdict.NEWER, 40.0, past_objective=True, now_s=1)
    return recent


def test_what_processes_counted_adds_up():
    one, other, both = busy(first_ms=1), busy(first_ms=500), busy(first_ms=1)
    for number in range(100):
        both.note_end(Ended.ANSWERED, 500 + number, now_s=1)
        both.note_served(Served.HIT, 5.0, now_s=1)
        both.note_audited(Verdict.NEWER, 40.0, past_objective=True, now_s=1)
    told = orjson.loads(orjson.dumps(other.tally(60, now_s=1).told()))
    assert (one.tally(60, now_s=1) + Tally.read(told)).window(60) == both.window(60, now_s=1)


@pytest.mark.parametrize("change", [{"ended": [1]}, {"times": None}, {"times": [[1, 2], 3.0]}, {"served": ["many"]}])
def test_what_another_release_counted_is_refused(change):
    told = RollingStats().tally(60, now_s=1).told()
    with pytest.raises(ValueError, match=r"not a tally|invalid literal"):
        Tally.read(told | change)
    with pytest.raises(ValueError, match="not a tally"):
        Tally.read({})


@pytest.mark.parametrize("ms", [0.0, 0.01, 1e9])
def test_times_beyond_all_buckets_are_counted(ms):
    recent = RollingStats()
    recent.note_end(Ended.ANSWERED, ms, now_s=1)
    assert recent.window(1, now_s=1).requests == 1


@pytest.mark.parametrize(
    ("status", "ended"), [(200, "answered"), (422, "client"), (429, "limited"), (503, "unavailable"), (500, "internal")]
)
def test_a_status_says_who_is_at_fault(status, ended):
    assert Ended.of(status) == ended


def window_of(**counts):
    recent = RollingStats()
    for name, count in counts.items():
        for _ in range(count):
            recent.note_end(Ended(name), 10.0, now_s=1)
    return recent.window(60, now_s=1)


def test_a_process_without_faults_has_a_hundred_points():
    assert health(window_of(answered=100, client=50), {"index": WELL}).score == 100


@pytest.mark.parametrize(
    ("window", "parts", "score", "reason"),
    [
        ({"answered": 100}, {"index": PartState(needed=True, fault="away")}, 50, "index: away"),
        ({"answered": 100}, {"redis": PartState(needed=False, fault="away")}, 90, "redis: away"),
        ({"answered": 95, "internal": 5}, {}, 80, "5.0% of requests failed"),
        ({"internal": 100}, {}, 60, "100.0% of requests failed"),
        ({"unavailable": 100}, {}, 70, "100.0% of requests were refused"),
        ({"answered": 1, "internal": 1}, {}, 100, None),
    ],
)
def test_points_are_lost_for_reasons(window, parts, score, reason):
    scored = health(window_of(**window), parts)
    assert scored.score == score
    assert scored.reasons[:1] == (() if reason is None else (reason,))


def test_slowness_costs_points():
    recent = RollingStats()
    for _ in range(100):
        recent.note_end(Ended.ANSWERED, 1_500.0, now_s=1)
    scored = health(recent.window(60, now_s=1), {})
    assert scored.score == pytest.approx(90, abs=1)
    assert "p99" in scored.reasons[0]


class Answers:
    error: Exception | None = None

    async def answer(self, _request, _access):
        if self.error:
            raise self.error
        as_of = AsOf(positions={}, checked_ms=1)
        return QueryResponse(results=(), query_time_ms=1, cached=False, as_of=as_of).model_dump_json().encode()


class World:
    def __init__(self, *, memory_limit_bytes=None):
        self.fault: Exception | None = None
        self.answers = Answers()
        self.operations = Operations(
            {"index": Part(self.check, needed=True)}, RollingStats(), memory_limit_bytes=memory_limit_bytes
        )
        credentials = Credentials(Settings(tenant=TenantSettings(api_key=SecretStr("k"))))
        app = build_app(
            self.answers,
            None,
            credentials=credentials,
            operations=self.operations,
            explaining=None,
            registry=CollectorRegistry(),
        )
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://x", headers={"X-API-Key": "k"})

    async def check(self):
        if self.fault:
            raise self.fault

    async def ask(self, times, error=None):
        self.answers.error = error
        for _ in range(times):
            await self.client.post("/v1/query", json={"query": "x"})


async def test_the_summary_tells_requests_by_their_end():
    world = World()
    await world.ask(30)
    await world.ask(3, IndexUnavailable("away"))
    await world.ask(2, RuntimeError("ours"))
    await world.client.post("/v1/query", json={"query": ""})
    response = await world.client.get("/performance-summary", params={"window": 60})
    summary = PerformanceSummary.model_validate_json(response.content)
    assert (summary.window_s, summary.requests) == (60, 36)
    assert summary.errors == {"client": 1, "limited": 0, "unavailable": 3, "internal": 2}
    assert summary.error_share == pytest.approx(2 / 36)
    assert summary.times.p50_ms > 0
    assert summary.health.score < 100
    assert summary.health.reasons


@pytest.mark.parametrize("window", ["0", "3601", "x"])
async def test_a_window_is_a_second_to_an_hour(window):
    assert (await World().client.get("/performance-summary", params={"window": window})).status_code == 422


async def test_the_summary_is_for_operators():
    response = await World().client.get("/performance-summary", headers={"X-API-Key": "other"})
    assert response.status_code == 401


async def test_own_errors_make_a_process_fail_and_those_of_stores_do_not():
    world = World()
    await world.ask(30, IndexUnavailable("away"))
    report = await world.client.get("/health")
    assert (report.status_code, report.json()["status"], report.json()["error_share"]) == (200, "ok", 0.0)
    await world.ask(3, RuntimeError("ours"))
    report = await world.client.get("/health")
    assert (report.status_code, report.json()["status"]) == (503, "failing")


async def test_memory_beyond_its_limit_makes_a_process_fail():
    assert (await World(memory_limit_bytes=2**60).client.get("/health")).status_code == 200
    report = await World(memory_limit_bytes=1).client.get("/health")
    assert (report.status_code, report.json()["memory_bytes"] > 1) == (503, True)


async def test_a_process_that_drains_answers_and_asks_for_no_more():
    world = World()
    kept = await world.client.post("/v1/query", json={"query": "x"})
    assert "connection" not in kept.headers
    world.operations.drain()
    assert (await world.client.get("/ready")).status_code == 503
    ended = await world.client.post("/v1/query", json={"query": "x"})
    assert (ended.status_code, ended.headers["connection"]) == (200, "close")
    assert (await world.client.get("/health")).status_code == 200


class Index:
    at: dict[int, int]

    async def positions(self, _tenant):
        return dict(self.at)


async def test_invalidation_lags_when_a_change_stays_unapplied():
    cache, index, clock = MemoryAnswerCache(), Index(), [100.0]
    await cache.seed("acme", {})
    lag = InvalidationLag(cache, index, "acme", monotonic_s=lambda: clock[0])
    index.at = {0: 5}
    await lag.check()
    clock[0] += 0.2
    await lag.check()  # a moment is how it works
    clock[0] += OBJECTIVE_S
    with pytest.raises(InvalidationLags, match="partitions 0"):
        await lag.check()
    await cache.apply("acme", {0: 5}, drop=True)
    for offset in range(6, 10):  # never quite level, and never late
        index.at = {0: offset}
        await lag.check()
        clock[0] += 2 * OBJECTIVE_S
        await cache.apply("acme", {0: offset}, drop=True)


async def test_a_tenant_that_falls_behind_is_told_until_it_has_caught_up():
    cache, index, clock, registry = MemoryAnswerCache(), Index(), [100.0], CollectorRegistry()
    await cache.seed("acme", {})
    watch = InvalidationLagMonitor(cache, index, QueryMetrics(registry), monotonic_s=lambda: clock[0])
    index.at = {0: 5}
    assert not watch.behind("acme")
    await watch.look()
    clock[0] += OBJECTIVE_S + 0.1
    assert not watch.behind("umbrella")
    await watch.look()
    assert watch.behind("acme")
    assert watch.late
    assert not watch.behind("umbrella"), "it has only begun to be looked after"
    assert registry.get_sample_value("freshline_invalidation_behind") == 1
    assert watch.searchable("acme").positions == {0: 5}
    clock[0] += 0.6
    assert watch.searchable("acme") is None, "that was too long ago to be told as of now"
    await cache.apply("acme", {0: 5}, drop=True)
    await watch.look()
    assert not watch.behind("acme")


async def test_what_nobody_applies_any_more_costs_all_answers_once():
    """The cache has forgotten what was applied to it, and was told an older position of the index."""
    cache, index, clock, registry = MemoryAnswerCache(), Index(), [100.0], CollectorRegistry()
    watch = InvalidationLagMonitor(cache, index, QueryMetrics(registry), monotonic_s=lambda: clock[0])
    index.at = {0: 5}
    await cache.seed("acme", {0: 4})
    look = await cache.lookup("acme", "a")
    assert await cache.store("acme", "a", b"an answer", epoch=look.epoch, ttl_s=60)

    async def behind_after(seconds):
        for _ in range(round(seconds)):
            clock[0] += 1.0
            watch.behind("acme")
            await watch.look()
        return watch.behind("acme")

    watch.behind("acme")
    await watch.look()
    assert await behind_after(2)
    for _ in range(3):  # somebody is at it, if slowly
        assert await behind_after(GIVE_UP_S - 2)
        index.at = {0: index.at[0] + 1}
        await cache.apply("acme", {0: index.at[0] - 1}, drop=False)
        assert await behind_after(1)
    assert (await cache.lookup("acme", "a")).entry is not None
    assert not await behind_after(GIVE_UP_S + 1)
    look = await cache.lookup("acme", "a")
    assert (look.entry, look.positions) == (None, {0: 8})


async def test_after_an_outage_of_the_cache_what_is_searchable_has_to_be_applied_first():
    cache, index, clock, registry = MemoryAnswerCache(), Index(), [100.0], CollectorRegistry()
    watch = InvalidationLagMonitor(cache, index, QueryMetrics(registry), monotonic_s=lambda: clock[0])
    index.at = {0: 5}
    await cache.seed("acme", {0: 5})
    watch.behind("acme")
    await watch.look()
    assert not watch.behind("acme")
    cache.available = False
    await watch.look()
    assert watch.behind("acme")
    assert not watch.late, "nothing can reach it, so nothing is late"
    cache.available, index.at = True, {0: 6}
    await watch.look()
    assert watch.behind("acme"), "a change came meanwhile, and no answer knows of it"
    await cache.apply("acme", {0: 6}, drop=True)
    await watch.look()
    assert not watch.behind("acme")
    cache.available = False
    await watch.look()
    cache.available = True
    cache.lose_everything()
    await watch.look()
    assert not watch.behind("acme"), "there is nothing that could be old"


async def test_who_stops_asking_is_forgotten():
    cache, index, clock, registry = MemoryAnswerCache(), Index(), [100.0], CollectorRegistry()
    watch = InvalidationLagMonitor(cache, index, QueryMetrics(registry), monotonic_s=lambda: clock[0])
    index.at = {0: 5}
    cache.available = False
    watch.behind("acme")
    await watch.look()
    assert registry.get_sample_value("freshline_invalidation_behind") == 1
    clock[0] += 60
    await watch.look()
    assert registry.get_sample_value("freshline_invalidation_behind") == 0
