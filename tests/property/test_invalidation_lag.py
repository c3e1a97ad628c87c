"""When the cached answers of a tenant are left aside: never later than the objective, and not for being busy."""

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from infra.redis.memory_answers import MemoryAnswerCache
from query.cache.invalidation_lag import LOOK_S, OBJECTIVE_S, InvalidationLagMonitor
from query.telemetry.metrics import QueryMetrics
from schemas.index import MANIFESTS_REFRESH_S

STEP_S = 0.01
LOOKS_EVERY = st.floats(LOOK_S, 1.5 * LOOK_S)


def worlds(times_s, most):
    """Each change comes so long after the one before, and is applied so long after it has come."""
    changes = st.lists(st.tuples(times_s, st.floats(0, MANIFESTS_REFRESH_S), times_s), min_size=1, max_size=most)
    return changes.map(lambda told: World(*zip(*told, strict=True)))


class World:
    """Changes of one partition in the order in which they become searchable, seen a moment later, and then applied."""

    def __init__(self, pauses_s, seen_after_s, applied_after_s):
        self.searchable_s = [2 + at_s for at_s in accumulate(pauses_s)]
        self.seen_s = [at_s + after_s for at_s, after_s in zip(self.searchable_s, seen_after_s, strict=True)]
        # In order: one that is late holds up those behind it.
        applied_s = [at_s + after_s for at_s, after_s in zip(self.searchable_s, applied_after_s, strict=True)]
        self.applied_s = list(accumulate(applied_s, max))
        self.now_s = 0.0

    async def positions(self, _tenant):
        seen = [offset for offset, at_s in enumerate(self.seen_s) if at_s <= self.now_s]
        return {0: max(seen)} if seen else {}

    @property
    def oldest_missing_s(self):
        missing = [at_s for at_s, to_s in zip(self.searchable_s, self.applied_s, strict=True) if to_s > self.now_s]
        return min((at_s for at_s in missing if at_s <= self.now_s), default=self.now_s)


async def replay(world, look_every_s, told):
    cache = MemoryAnswerCache()
    await cache.seed("acme", {})
    watch = InvalidationLagMonitor(cache, world, QueryMetrics(CollectorRegistry()), monotonic_s=lambda: world.now_s)
    look_at_s, applied = 0.0, -1
    while world.now_s < world.applied_s[-1] + 2:
        world.now_s += STEP_S
        while applied + 1 < len(world.applied_s) and world.applied_s[applied + 1] <= world.now_s:
            applied += 1
            await cache.apply("acme", {0: applied}, drop=False)
        told(watch.behind("acme"))
        if world.now_s >= look_at_s:
            await watch.look()
            look_at_s = world.now_s + look_every_s
    return watch


@given(worlds(st.floats(0, 3), 8), LOOKS_EVERY)
async def test_no_cached_answer_is_served_that_lacks_a_change_for_longer_than_the_objective(world, look_every_s):
    def told(behind):
        assert behind or world.now_s - world.oldest_missing_s <= OBJECTIVE_S, world.now_s

    watch = await replay(world, look_every_s, told)
    assert not watch.behind("acme"), "all is applied"


@given(worlds(st.floats(0, 0.2), 30), LOOKS_EVERY)
async def test_answers_are_served_while_each_change_is_applied_in_good_time(world, look_every_s):
    def told(behind):
        assert not behind, world.now_s

    await replay(world, look_every_s, told)
