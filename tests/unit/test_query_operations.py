"""Rolling statistics, health, readiness, draining, and invalidation lag."""

import httpx
import orjson
import pytest
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from infra.opensearch.port import IndexUnavailable
from infra.redis.memory_answers import MemoryAnswerCache
from infra.settings import Settings, TenantSettings
from infra.web.credentials import Credentials
from query.api.app import ApiPolicy, ApiServices, ApiTelemetry, build_app
from query.cache.invalidation_lag import (
    DROP_ALL_AFTER_S,
    OBJECTIVE_S,
    InvalidationLag,
    InvalidationLagMonitor,
    InvalidationLags,
)
from query.operations.endpoints import Dependency, Operations
from query.operations.health import DependencyState, health
from query.telemetry.audit_verdicts import AuditVerdict
from query.telemetry.metrics import QueryMetrics
from query.telemetry.rolling_stats import MAX_WINDOW_S, CacheStatus, RequestOutcome, RollingStats, WindowCounts
from schemas.operations import PerformanceSummary
from schemas.positions import AsOf
from schemas.queries import QueryResponse

AVAILABLE = DependencyState(required=True, fault=None)


def test_a_window_counts_only_its_seconds():
    stats = RollingStats()
    for second in range(100):
        stats.record_request(RequestOutcome.ANSWERED, 10.0, now_s=second)
        stats.record_answer(CacheStatus.HIT if second % 2 else CacheStatus.FILLED, 1.0, now_s=second)
    window = stats.window(10, now_s=99.9)
    assert (window.requests, window.answers[CacheStatus.HIT], window.answers[CacheStatus.FILLED]) == (10, 5, 5)
    assert stats.window(MAX_WINDOW_S, now_s=99).requests == 100
    assert stats.window(10, now_s=108).requests == 1
    assert stats.window(10, now_s=200).requests == 0
    assert stats.window(10, now_s=200).cache_hit_rate is None


def test_an_hour_later_a_second_is_counted_again():
    stats = RollingStats()
    stats.record_request(RequestOutcome.ANSWERED, 10.0, now_s=5)
    stats.record_request(RequestOutcome.INTERNAL, 10.0, now_s=5 + MAX_WINDOW_S)
    window = stats.window(MAX_WINDOW_S, now_s=5 + MAX_WINDOW_S)
    assert (window.requests, window.outcomes[RequestOutcome.INTERNAL], window.latency.mean_ms) == (1, 1, 0.0)


def test_percentiles_have_a_relative_error_of_at_most_five_percent():
    stats = RollingStats()
    for number in range(1, 10_001):
        stats.record_request(RequestOutcome.ANSWERED, number / 10, now_s=number % 50)
    latency = stats.window(60, now_s=50).latency
    assert latency.mean_ms == pytest.approx(500.05)
    for estimate, exact in ((latency.p50_ms, 500), (latency.p95_ms, 950), (latency.p99_ms, 990)):
        assert estimate == pytest.approx(exact, rel=0.05)


def busy(*, first_ms):
    stats = RollingStats()
    for number in range(100):
        stats.record_request(RequestOutcome.ANSWERED, first_ms + number, now_s=1)
        stats.record_answer(CacheStatus.HIT, 5.0, now_s=1)
        stats.record_audit(AuditVerdict.NEWER, 40.0, violates_slo=True, now_s=1)
    return stats


def test_counts_of_processes_add_up():
    one, other, both = busy(first_ms=1), busy(first_ms=500), busy(first_ms=1)
    for number in range(100):
        both.record_request(RequestOutcome.ANSWERED, 500 + number, now_s=1)
        both.record_answer(CacheStatus.HIT, 5.0, now_s=1)
        both.record_audit(AuditVerdict.NEWER, 40.0, violates_slo=True, now_s=1)
    received = WindowCounts.from_json(orjson.loads(orjson.dumps(other.counts(60, now_s=1).to_json())))
    assert (one.counts(60, now_s=1) + received).stats(60) == both.window(60, now_s=1)


@pytest.mark.parametrize(
    "change", [{"outcomes": [1]}, {"latency": None}, {"latency": [[1, 2], 3.0]}, {"answers": ["many"]}]
)
def test_counts_of_another_release_are_rejected(change):
    encoded = RollingStats().counts(60, now_s=1).to_json()
    with pytest.raises(ValueError, match=r"not window counts|invalid literal"):
        WindowCounts.from_json(encoded | change)
    with pytest.raises(ValueError, match="not window counts"):
        WindowCounts.from_json({})


@pytest.mark.parametrize("ms", [0.0, 0.01, 1e9])
def test_durations_outside_the_buckets_are_counted(ms):
    stats = RollingStats()
    stats.record_request(RequestOutcome.ANSWERED, ms, now_s=1)
    assert stats.window(1, now_s=1).requests == 1


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(200, "answered"), (422, "client"), (429, "limited"), (503, "unavailable"), (500, "internal")],
)
def test_the_outcome_follows_from_the_status(status, outcome):
    assert RequestOutcome.of(status) == outcome


def window_of(**counts):
    stats = RollingStats()
    for name, count in counts.items():
        for _ in range(count):
            stats.record_request(RequestOutcome(name), 10.0, now_s=1)
    return stats.window(60, now_s=1)


def test_a_process_without_faults_has_the_full_score():
    assert health(window_of(answered=100, client=50), {"index": AVAILABLE}).score == 100


@pytest.mark.parametrize(
    ("window", "dependencies", "score", "reason"),
    [
        ({"answered": 100}, {"index": DependencyState(required=True, fault="down")}, 50, "index: down"),
        ({"answered": 100}, {"redis": DependencyState(required=False, fault="down")}, 90, "redis: down"),
        ({"answered": 95, "internal": 5}, {}, 80, "5.0% of requests failed"),
        ({"internal": 100}, {}, 60, "100.0% of requests failed"),
        ({"unavailable": 100}, {}, 70, "100.0% of requests were rejected"),
        ({"answered": 1, "internal": 1}, {}, 100, None),
    ],
)
def test_penalties_have_reasons(window, dependencies, score, reason):
    scored = health(window_of(**window), dependencies)
    assert scored.score == score
    assert scored.reasons[:1] == (() if reason is None else (reason,))


def test_latency_above_the_objective_is_penalised():
    stats = RollingStats()
    for _ in range(100):
        stats.record_request(RequestOutcome.ANSWERED, 1_500.0, now_s=1)
    scored = health(stats.window(60, now_s=1), {})
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
            {"index": Dependency(self.check, required=True)}, RollingStats(), memory_limit_bytes=memory_limit_bytes
        )
        credentials = Credentials(Settings(tenant=TenantSettings(api_key=SecretStr("k"))))
        app = build_app(
            ApiServices(self.answers, None, None, self.operations),
            ApiPolicy(credentials),
            ApiTelemetry(CollectorRegistry()),
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


async def test_the_summary_counts_requests_by_outcome():
    world = World()
    await world.ask(30)
    await world.ask(3, IndexUnavailable("down"))
    await world.ask(2, RuntimeError("bug"))
    await world.client.post("/v1/query", json={"query": ""})
    response = await world.client.get("/performance-summary", params={"window": 60})
    summary = PerformanceSummary.model_validate_json(response.content)
    assert (summary.window_s, summary.requests) == (60, 36)
    assert summary.errors == {"client": 1, "limited": 0, "unavailable": 3, "internal": 2}
    assert summary.error_rate == pytest.approx(2 / 36)
    assert summary.times.p50_ms > 0
    assert summary.health.score < 100
    assert summary.health.reasons


@pytest.mark.parametrize("window", ["0", "3601", "x"])
async def test_a_window_is_one_second_to_one_hour(window):
    assert (await World().client.get("/performance-summary", params={"window": window})).status_code == 422


async def test_the_summary_needs_the_admin_scope():
    response = await World().client.get("/performance-summary", headers={"X-API-Key": "other"})
    assert response.status_code == 401


async def test_internal_errors_fail_the_health_check_and_those_of_stores_do_not():
    world = World()
    await world.ask(30, IndexUnavailable("down"))
    report = await world.client.get("/health")
    assert (report.status_code, report.json()["status"], report.json()["error_rate"]) == (200, "ok", 0.0)
    await world.ask(3, RuntimeError("bug"))
    report = await world.client.get("/health")
    assert (report.status_code, report.json()["status"]) == (503, "failing")


async def test_memory_above_its_limit_fails_the_health_check():
    assert (await World(memory_limit_bytes=2**60).client.get("/health")).status_code == 200
    report = await World(memory_limit_bytes=1).client.get("/health")
    assert (report.status_code, report.json()["memory_bytes"] > 1) == (503, True)


async def test_a_draining_process_is_not_ready_and_closes_connections():
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
    await lag.require_caught_up()
    clock[0] += 0.2
    await lag.require_caught_up()  # a short lag is normal
    clock[0] += OBJECTIVE_S
    with pytest.raises(InvalidationLags, match="partitions 0"):
        await lag.require_caught_up()
    await cache.apply("acme", {0: 5}, drop=True)
    for offset in range(6, 10):  # never caught up, and never lagging
        index.at = {0: offset}
        await lag.require_caught_up()
        clock[0] += 2 * OBJECTIVE_S
        await cache.apply("acme", {0: offset}, drop=True)


async def test_a_tenant_is_lagging_until_its_changes_are_applied():
    cache, index, clock, registry = MemoryAnswerCache(), Index(), [100.0], CollectorRegistry()
    await cache.seed("acme", {})
    monitor = InvalidationLagMonitor(cache, index, QueryMetrics(registry), monotonic_s=lambda: clock[0])
    index.at = {0: 5}
    assert not monitor.is_lagging("acme")
    await monitor.check()
    clock[0] += OBJECTIVE_S + 0.1
    assert not monitor.is_lagging("umbrella")
    await monitor.check()
    assert monitor.is_lagging("acme")
    assert monitor.lags
    assert not monitor.is_lagging("umbrella"), "it was not active before"
    assert registry.get_sample_value("freshline_tenants_lagging") == 1
    assert monitor.searchable("acme").positions == {0: 5}
    clock[0] += 0.6
    assert monitor.searchable("acme") is None, "the last check is too old"
    await cache.apply("acme", {0: 5}, drop=True)
    await monitor.check()
    assert not monitor.is_lagging("acme")


async def test_all_answers_are_dropped_if_no_position_advances():
    """Redis has lost applied positions and was seeded with an older one from the index."""
    cache, index, clock, registry = MemoryAnswerCache(), Index(), [100.0], CollectorRegistry()
    monitor = InvalidationLagMonitor(cache, index, QueryMetrics(registry), monotonic_s=lambda: clock[0])
    index.at = {0: 5}
    await cache.seed("acme", {0: 4})
    lookup = await cache.lookup("acme", "a")
    assert await cache.store("acme", "a", b"an answer", epoch=lookup.epoch, ttl_s=60)

    async def lags_after(seconds):
        for _ in range(round(seconds)):
            clock[0] += 1.0
            monitor.is_lagging("acme")
            await monitor.check()
        return monitor.is_lagging("acme")

    monitor.is_lagging("acme")
    await monitor.check()
    assert await lags_after(2)
    for _ in range(3):  # slow progress
        assert await lags_after(DROP_ALL_AFTER_S - 2)
        index.at = {0: index.at[0] + 1}
        await cache.apply("acme", {0: index.at[0] - 1}, drop=False)
        assert await lags_after(1)
    assert (await cache.lookup("acme", "a")).entry is not None
    assert not await lags_after(DROP_ALL_AFTER_S + 1)
    lookup = await cache.lookup("acme", "a")
    assert (lookup.entry, lookup.positions) == (None, {0: 8})


async def test_after_a_redis_outage_a_tenant_lags_until_all_searchable_changes_are_applied():
    cache, index, clock, registry = MemoryAnswerCache(), Index(), [100.0], CollectorRegistry()
    monitor = InvalidationLagMonitor(cache, index, QueryMetrics(registry), monotonic_s=lambda: clock[0])
    index.at = {0: 5}
    await cache.seed("acme", {0: 5})
    monitor.is_lagging("acme")
    await monitor.check()
    assert not monitor.is_lagging("acme")
    cache.available = False
    await monitor.check()
    assert monitor.is_lagging("acme")
    assert not monitor.lags, "no change can be applied, so throttling retrievals would not help"
    cache.available, index.at = True, {0: 6}
    await monitor.check()
    assert monitor.is_lagging("acme"), "a change of the meantime is not applied"
    await cache.apply("acme", {0: 6}, drop=True)
    await monitor.check()
    assert not monitor.is_lagging("acme")
    cache.available = False
    await monitor.check()
    cache.available = True
    cache.lose_everything()
    await monitor.check()
    assert not monitor.is_lagging("acme"), "no answer is left that could be stale"


async def test_an_inactive_tenant_is_not_monitored():
    cache, index, clock, registry = MemoryAnswerCache(), Index(), [100.0], CollectorRegistry()
    monitor = InvalidationLagMonitor(cache, index, QueryMetrics(registry), monotonic_s=lambda: clock[0])
    index.at = {0: 5}
    cache.available = False
    monitor.is_lagging("acme")
    await monitor.check()
    assert registry.get_sample_value("freshline_tenants_lagging") == 1
    clock[0] += 60
    await monitor.check()
    assert registry.get_sample_value("freshline_tenants_lagging") == 0
