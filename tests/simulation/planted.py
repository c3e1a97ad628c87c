"""Mistakes planted on purpose: histories must tell each of them, or they would not tell ours."""

import asyncio
import time
from dataclasses import replace

from shaky_twins import Cache, WatchedIndex
from world import Parts

from infra.kafka.codec import encode_ended
from infra.opensearch.port import ManifestWrite
from infra.redis.memory_answers import _Answer
from ingest.event_status import EventStatuses
from query.retrieval import Retrieval
from schemas.documents import LifeState
from streams.core.commit_guard import LaneCommits
from streams.core.document_change import completed, supersede_within
from streams.core.outcomes import Finished
from streams.runner import Runner
from streams.steps.index import Index
from streams.steps.invalidate import Invalidate, ended
from streams.steps.notify import Notify
from streams.steps.prepare import Prepare


class CommitsPastAHole(LaneCommits):
    def committable(self):
        return self._next if self._next is not None and self._next > self._committed else None


class FinishesBeforeItIsDurable(Runner):
    async def _end(self, unended, outcomes):
        for delivery, _ in list(unended)[: len(outcomes)]:
            delivery.done()
        await super()._end(unended, outcomes)


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


class ClaimsAfterwards(Index):
    """Removes and writes passages first, and writes the manifest, complete at once, when that is done."""

    async def _write(self, changes, vectors, fresh):
        await self._make_searchable(changes, vectors)
        await self.index.store_vectors(fresh)
        await self.index.put_manifests(
            [
                ManifestWrite(completed(one.write.claim, now_ms=0), one.standing.revision if one.standing else None)
                for one in changes
            ]
        )
        return [self._outcome(change) for change in changes]


class LetsABrokenVersionSupersede(Prepare):
    async def run(self, tasks):
        newer = supersede_within([(task.message.key, task.message.version) for task in tasks])
        yield [
            await self._outcome(task, asyncio.Semaphore(1))
            if version is None
            else Finished((self._superseded(task, version),))
            for task, version in zip(tasks, newer, strict=True)
        ]


class ForgetsGroups(Index):
    async def _make_searchable(self, changes, vectors):
        for change in changes:
            change.write = replace(change.write, claim=change.write.claim.model_copy(update={"groups": ()}))
        await super()._make_searchable(changes, vectors)


class DropsNothing(Cache):
    async def settle(self, tenant, number, *, judged, epoch, drop, why=b""):  # noqa: ARG002 - that is the mistake
        return await super().settle(tenant, number, judged=judged, epoch=epoch, drop=(), why=why)


class StoresWhateverTheEpoch(Cache):
    async def store(self, tenant, key, entry, *, epoch, ttl_s, rest=b""):  # noqa: ARG002 - as above
        await self._faults.before()
        mine = self._slice(tenant, 0)
        mine.fill += 1
        mine.answers.pop(key, None)
        mine.answers[key] = _Answer(mine.fill, mine.epoch, entry, rest, self._now_us() + ttl_s * 1_000_000)
        return True


class AdvancesBeforeItDrops(Invalidate):
    """Tells positions first, and drops what they make stale a moment later."""

    async def run(self, tasks):
        kept = [task.message.model_copy(update={"added": (), "removed": ()}) for task in tasks]
        first = [replace(task, message=message) for task, message in zip(tasks, kept, strict=True)]
        [_ async for _ in super().run(first)]
        async for outcomes in super().run(tasks):
            yield outcomes


class AnswersWithTwoVersions(Retrieval):
    """Takes whatever is found."""

    async def _passages(self, candidates, access, top_k, _written):
        found, _ = await self._fetch(candidates, access, top_k)
        return tuple(found), True


class SearchesOnce(Retrieval):
    """Leaves out the version that is not to be seen, but does not look where all of the other is."""

    async def _passages(self, candidates, access, top_k, written):
        found, _ = await super()._passages(candidates, access, top_k, written)
        return found, True


class TellsOnlyWhatWasRecorded(EventStatuses):
    async def get(self, tenant, event_id):
        return await self.states.get(tenant, event_id)


class ForgetsWhatFailed(Notify):
    """Goes on when a receiver fails, and keeps nothing."""

    async def _tried(self, webhook, messages):
        tried = await super()._tried(webhook, messages)
        return replace(tried, left=())


class TellsBeforeAnswersAreDropped(Invalidate):
    """Sends the ends first."""

    async def run(self, tasks):
        now_ms = time.time() * 1_000
        yield [
            Finished((encode_ended(ended(task.message, now_ms), task.partition, task.traceparent),)) for task in tasks
        ]
        async for _ in super().run(tasks):
            pass


PLANTED = {
    "commits past a hole": Parts(lane=CommitsPastAHole),
    "finishes before it is durable": Parts(runner=FinishesBeforeItIsDurable),
    "keeps no tombstone": Parts(index=KeepsNoTombstone),
    "refreshes after the change record": Parts(index=RefreshesAfterwards),
    "removes before it writes": Parts(index=RemovesFirst),
    "ignores versions": Parts(index=IgnoresVersions),
    "manifest after delete": Parts(step=ClaimsAfterwards),
    "lets a broken version supersede": Parts(prepare=LetsABrokenVersionSupersede),
    "forgets groups": Parts(step=ForgetsGroups),
    "drops nothing": Parts(cache=DropsNothing),
    "stores whatever the epoch": Parts(cache=StoresWhateverTheEpoch),
    "answers with two versions": Parts(retrieval=AnswersWithTwoVersions, asks_per_s=30),
    "searches once": Parts(retrieval=SearchesOnce, asks_per_s=100),
    "tells only what was recorded": Parts(statuses=TellsOnlyWhatWasRecorded),
    "advances before it drops": Parts(invalidate=AdvancesBeforeItDrops),
    "forgets what a receiver did not take": Parts(notify=ForgetsWhatFailed),
    "tells of ends before answers are dropped": Parts(invalidate=TellsBeforeAnswersAreDropped),
}
