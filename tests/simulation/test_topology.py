"""Hundreds of histories of the steps and of readers: crashes, zombies, failing stores, redelivery, duplicates.

Hypothesis chooses the plans, and shrinks a failing one to the fewest events and kinds of faults. The printed plan is
replayed exactly by ``SIMULATION_PLAN='SEED EVENTS FAULT,FAULT,…' pytest tests/simulation -k replayed``;
``SIMULATION_HISTORIES=N`` runs more histories.
"""

import inspect
import os
import traceback

import planted as planted_module
import pytest
import structlog
from faults import Fault
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from planted import PLANTED
from virtual_time import run
from world import MOST_EVENTS, Parts, Plan, Violated, World

pytestmark = pytest.mark.timeout(1_200)  # some mistakes show in one of a hundred histories only

HISTORIES = int(os.environ.get("SIMULATION_HISTORIES", "300"))
PLANTED_HISTORIES = max(HISTORIES, 1_000)
PLANS = st.builds(
    Plan,
    seed=st.integers(0, 2**32 - 1),
    events=st.integers(1, MOST_EVENTS),
    # Usually all kinds: shrinking finds the relevant ones.
    faults=st.just(frozenset(Fault)) | st.frozensets(st.sampled_from(Fault)),
)


@pytest.fixture(autouse=True)
def quiet():
    """Logging is off: the log would consist of the injected faults."""
    with structlog.testing.capture_logs():
        yield


async def history(plan: Plan, parts: Parts) -> World:
    world = World(plan, parts)
    await world.live()
    return world


def violated(plan: Plan, parts: Parts) -> str | None:
    try:
        run(history(plan, parts))
    except Violated as violation:
        return str(violation)
    except Exception:  # noqa: BLE001 - any failure is reported with its plan
        return traceback.format_exc()
    return None


def replayable(plan: Plan) -> str:
    return f"SIMULATION_PLAN='{plan.seed} {plan.events} {','.join(sorted(plan.faults))}'"


def parse_plan(text: str) -> Plan:
    seed, events, *faults = text.split()
    return Plan(int(seed), int(events), frozenset(Fault(name) for name in ",".join(faults).split(",") if name))


@settings(max_examples=HISTORIES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=PLANS)
def test_every_history_keeps_the_invariants(plan):
    note(replayable(plan))
    violation = violated(plan, Parts())
    assert violation is None, f"{replayable(plan)}: {violation}"


@pytest.mark.parametrize(
    "plan",
    [parse_plan(os.environ.get("SIMULATION_PLAN", "7 12 crash,zombie,store-error"))],
    ids=lambda plan: f"seed {plan.seed}",
)
def test_a_replayed_plan_keeps_the_invariants(plan):
    assert violated(plan, Parts()) is None


def test_equal_plans_give_equal_histories():
    logs = [run(history(Plan(7), Parts())).streams.log for _ in range(2)]
    first, second = (
        {lane: [(one.key, one.partition, one.headers) for one in log] for lane, log in one.items() if "doc" in lane[0]}
        for one in logs
    )
    assert first == second
    lengths = [{lane: len(log) for lane, log in one.items()} for one in logs]
    assert lengths[0] == lengths[1]
    assert sum(lengths[0].values()) > 30


def test_planted_mistakes_have_the_signatures_of_the_methods_they_replace():
    """With another signature, a mistake would fail on the call and count as detected."""
    for mistaken in vars(planted_module).values():
        if not isinstance(mistaken, type) or mistaken.__module__ != planted_module.__name__:
            continue
        for name, method in vars(mistaken).items():
            replaced = getattr(super(mistaken, mistaken), name, None)
            if inspect.isfunction(method) and inspect.isfunction(replaced):
                own, expected = (
                    [one.lstrip("_") for one in inspect.signature(each).parameters] for each in (method, replaced)
                )
                assert own == expected, f"{mistaken.__name__}.{name}"


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_mistakes_are_detected(planted):
    plans = (Plan(seed) for seed in range(PLANTED_HISTORIES))
    assert any(violated(plan, PLANTED[planted]) for plan in plans), f"{PLANTED_HISTORIES} histories did not detect it"
