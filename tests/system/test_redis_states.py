"""Whatever Redis does, no answer is older than it says, nor older than the objective allows."""

import pytest

from bench.redis_states import bench_redis_states
from infra.local.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(240)]

SECONDS = 3


async def test_answers_are_true_in_every_state_of_redis(stack: Stack):
    told = await bench_redis_states(stack, seconds=SECONDS, say=lambda _what, _state: None)
    states = told["states"]
    assert {name: state["stale"] for name, state in states.items() if state["stale"]} == {}
    assert {name: state["failed"] for name, state in states.items() if state["failed"]} == {}
    assert {name: state for name, state in states.items() if state["served_past_objective"]} == {}
    for name in ("healthy", "slow", "full", "wiped", "failed over", "healthy again"):
        assert states[name]["hit_share"] > 0.2, name
    for name in ("hanging", "down"):
        assert states[name]["hit_share"] < 0.5, name
