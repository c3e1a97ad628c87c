"""Cache bypass on invalidation lag: before the freshness SLO is violated, and not under a normal load of changes."""

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from infra.redis.memory_answers import MemoryAnswerCache
from query.cache.invalidation_lag import CHECK_INTERVAL_S, OBJECTIVE_S, InvalidationLagMonitor
from query.telemetry.metrics import QueryMetrics
from schemas.index import MANIFESTS_REFRESH_S

STEP_S = 0.01
INTERVALS = st.floats(CHECK_INTERVAL_S, 1.5 * CHECK_INTERVAL_S)


def worlds(times_s, most):
    """Changes with random intervals, visibility delays and application delays."""
    changes = st.lists(st.tuples(times_s, st.floats(0, MANIFESTS_REFRESH_S), times_s), min_size=1, max_size=most)
    return changes.map(lambda drawn: World(*zip(*drawn, strict=True)))


class World:
    """Changes of one partition: searchable, then visible in the positions of the index, then applied."""

    def __init__(self, pauses_s, visible_after_s, applied_after_s):
        self.searchable_s = [2 + at_s for at_s in accumulate(pauses_s)]
        self.visible_s = [at_s + after_s for at_s, after_s in zip(self.searchable_s, visible_after_s, strict=True)]
        # In order: a slow change delays all later ones.
        applied_s = [at_s + after_s for at_s, after_s in zip(self.searchable_s, applied_after_s, strict=True)]
        self.applied_s = list(accumulate(applied_s, max))
        self.now_s = 0.0

    async def positions(self, _tenant):
        visible = [offset for offset, at_s in enumerate(self.visible_s) if at_s <= self.now_s]
        return {0: max(visible)} if visible else {}

    @property
    def oldest_missing_s(self):
        missing = [at_s for at_s, to_s in zip(self.searchable_s, self.applied_s, strict=True) if to_s > self.now_s]
        return min((at_s for at_s in missing if at_s <= self.now_s), default=self.now_s)


async def replay(world, interval_s, on_state):
    cache = MemoryAnswerCache()
    await cache.seed("acme", {})
    monitor = InvalidationLagMonitor(cache, world, QueryMetrics(CollectorRegistry()), monotonic_s=lambda: world.now_s)
    check_at_s, applied = 0.0, -1
    while world.now_s < world.applied_s[-1] + 2:
        world.now_s += STEP_S
        while applied + 1 < len(world.applied_s) and world.applied_s[applied + 1] <= world.now_s:
            applied += 1
            await cache.apply("acme", {0: applied}, drop=False)
        on_state(monitor.is_lagging("acme"))
        if world.now_s >= check_at_s:
            await monitor.check()
            check_at_s = world.now_s + interval_s
    return monitor


@given(worlds(st.floats(0, 3), 8), INTERVALS)
async def test_no_cached_answer_violates_the_freshness_slo(world, interval_s):
    def on_state(is_lagging):
        assert is_lagging or world.now_s - world.oldest_missing_s <= OBJECTIVE_S, world.now_s

    monitor = await replay(world, interval_s, on_state)
    assert not monitor.is_lagging("acme"), "all changes are applied"


@given(worlds(st.floats(0, 0.2), 30), INTERVALS)
async def test_the_cache_is_used_while_changes_are_applied_promptly(world, interval_s):
    def on_state(is_lagging):
        assert not is_lagging, world.now_s

    await replay(world, interval_s, on_state)
