"""In every state of Redis, no answer is older than its ``as_of`` or violates the freshness SLO."""

import pytest

from bench.redis_states import bench_redis_states
from infra.local.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(240)]

SECONDS = 3
HITS = 50
"""A state in which the cache can be used lasts until there are so many, whatever the speed of the machine."""


async def test_no_stale_or_failed_answer_in_any_state_of_redis(stack: Stack):
    report = await bench_redis_states(stack, seconds=SECONDS, hits=HITS, say=lambda _what, _state: None)
    states = report["states"]
    assert {name: state["stale"] for name, state in states.items() if state["stale"]} == {}
    assert {name: state["first_failure"] for name, state in states.items() if state["failed"]} == {}
    assert {name: state for name, state in states.items() if state["slo_violations"]} == {}
    for name in ("healthy", "slow", "out of memory", "wiped", "failed over", "healthy again"):
        assert states[name]["hits"] >= HITS, name
    for name in ("hanging", "down"):
        assert states[name]["hit_rate"] < 0.5, name
