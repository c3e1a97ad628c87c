"""Hundreds of histories of the three steps: duplicates, redelivery, crashes between any two awaits, failing stores.

A failure names its seed. ``SIMULATION_SEED=N pytest tests/simulation`` runs that history alone;
``SIMULATION_HISTORIES=N`` runs more of them.
"""

import asyncio
import os
import traceback

import pytest
import structlog
from shaky_twins import WatchedIndex
from virtual_time import run
from world import Parts, Violation, World

from ingest.event_status import EventStatuses
from query.retrieval import Retrieval
from schemas.documents import LifeState
from streams.core.commit_guard import LaneCommits
from streams.core.document_change import supersede_within
from streams.core.outcomes import Finished
from streams.steps.prepare import Prepare

HISTORIES = int(os.environ.get("SIMULATION_HISTORIES", "300"))
SEED = os.environ.get("SIMULATION_SEED")
SEEDS = range(HISTORIES) if SEED is None else [int(SEED)]
BLOCK = 25


@pytest.fixture(autouse=True)
def quiet():
    """Faults are what is wanted here: their log would be all there is to see."""
    with structlog.testing.capture_logs():
        yield


async def history(seed: int, parts: Parts) -> World:
    world = World(seed, parts)
    await world.live()
    return world


def violated(seed: int, parts: Parts) -> Violation | None:
    try:
        run(history(seed, parts))
    except Violation as violation:
        return violation
    except Exception:  # noqa: BLE001 - whatever ends a history, its seed is what is needed
        return Violation(traceback.format_exc())
    return None


@pytest.mark.parametrize(
    "seeds", [SEEDS[at : at + BLOCK] for at in range(0, len(SEEDS), BLOCK)], ids=lambda some: f"{some[0]}-{some[-1]}"
)
def test_every_history_keeps_the_invariants(seeds):
    for seed in seeds:
        if violation := violated(seed, Parts()):
            pytest.fail(f"SIMULATION_SEED={seed}: {violation}")


def test_equal_seeds_give_equal_histories():
    logs = [run(history(7, Parts())).streams.log for _ in range(2)]
    first, second = ({lane: [(one.key, one.partition) for one in log] for lane, log in one.items()} for one in logs)
    assert first == second
    assert sum(map(len, first.values())) > 30


# Mistakes planted on purpose: histories must tell each of them.


class CommitsWhatIsDelivered(LaneCommits):
    def committable(self):
        return self._next if self._next is not None and self._next > self._committed else None


class KeepsNoTombstone(WatchedIndex):
    async def put_manifests(self, writes):
        put = await super().put_manifests(writes)
        for manifest in [write.manifest for write in writes]:
            if manifest.complete and manifest.state is LifeState.DELETED:
                self._manifests.pop(manifest.key, None)
        return put


class RefreshesAfterwards(WatchedIndex):
    """What was written becomes searchable with the next change only."""

    late = ()

    def _refresh(self, keys):
        keys = list(keys)
        super()._refresh(self.late)
        self.late = keys


class RemovesFirst(WatchedIndex):
    """Takes the old passages away, refreshes, and writes the new ones then."""

    async def apply(self, changes):
        await super().apply([type(one)(one.key, one.version, (), one.remove) for one in changes])
        return await super().apply(changes)


class IgnoresVersions(WatchedIndex):
    def _version(self, _chunk_id):
        return -1


class LetsABrokenVersionSupersede(Prepare):
    async def run(self, tasks):
        newer = supersede_within([(task.message.key, task.message.version) for task in tasks])
        yield [
            await self._outcome(task, asyncio.Semaphore(1))
            if version is None
            else Finished((self._superseded(task, version),))
            for task, version in zip(tasks, newer, strict=True)
        ]


class AnswersWithTwoVersions(Retrieval):
    """Takes whatever is found."""

    async def _passages(self, candidates, access, top_k, _written):
        found, _ = await self._fetch(candidates, access, top_k)
        return found, True


class SearchesOnce(Retrieval):
    """Leaves out the version that is not to be seen, but does not look where all of the other is."""

    async def _passages(self, candidates, access, top_k, written):
        found, _ = await super()._passages(candidates, access, top_k, written)
        return found, True


class TellsOnlyWhatWasRecorded(EventStatuses):
    async def get(self, tenant, event_id):
        return await self.states.get(tenant, event_id)


PLANTED = {
    "commits what is delivered": Parts(lane=CommitsWhatIsDelivered),
    "keeps no tombstone": Parts(index=KeepsNoTombstone),
    "completes before the refresh": Parts(index=RefreshesAfterwards),
    "removes before it writes": Parts(index=RemovesFirst),
    "ignores versions": Parts(index=IgnoresVersions),
    "answers with two versions": Parts(retrieval=AnswersWithTwoVersions),
    "searches once": Parts(retrieval=SearchesOnce),
    "tells only what was recorded": Parts(statuses=TellsOnlyWhatWasRecorded),
    "lets a broken version supersede": Parts(prepare=LetsABrokenVersionSupersede),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_mistakes_are_caught(planted):
    caught = (violation for seed in range(HISTORIES) if (violation := violated(seed, PLANTED[planted])))
    assert next(caught, None), f"{HISTORIES} histories did not tell"
