"""Planted mistakes. The simulation must detect each of them, to show that it would detect real ones."""

import time
from dataclasses import replace

from shaky_twins import Cache, WatchedIndex
from world import Parts

from infra.kafka.codec import encode_ended
from infra.opensearch.port import ManifestWrite
from infra.redis.memory_answers import _Answer
from ingest.event_status import EventStatuses
from query.retrieval.retrieve import Retrieval
from schemas.documents import LifeState
from schemas.index import original_id
from streams.core.commit_guard import LaneCommits
from streams.core.document_change import completed
from streams.core.outcomes import Finished
from streams.recovery import Found
from streams.runner import Runner
from streams.steps.index import Index
from streams.steps.invalidate import Invalidate, ended
from streams.steps.notify import Notify


class CommitsPastAHole(LaneCommits):
    def committable(self):
        return self._next if self._next is not None and self._next > self._committed else None


class FinishesBeforeItIsDurable(Runner):
    async def _finish(self, unfinished, outcomes):
        for delivery, _ in list(unfinished)[: len(outcomes)]:
            delivery.done()
        await super()._finish(unfinished, outcomes)


class KeepsNoTombstone(WatchedIndex):
    async def put_manifests(self, writes):
        put = await super().put_manifests(writes)
        for manifest in [write.manifest for write in writes]:
            if manifest.complete and manifest.state is LifeState.DELETED:
                self._manifests.pop(manifest.key, None)
        return put


class RefreshesAfterwards(WatchedIndex):
    """Written passages become searchable only with the next change."""

    late = ()

    def _refresh(self, keys):
        keys = list(keys)
        super()._refresh(self.late)
        self.late = keys


class RemovesFirst(WatchedIndex):
    """Removes the old passages, refreshes, and then writes the new ones."""

    async def apply(self, changes):
        await super().apply([type(one)(one.key, one.version, (), one.remove) for one in changes])
        return await super().apply(changes)


class IgnoresVersions(WatchedIndex):
    def _version(self, _chunk_id):
        return -1


class ClaimsAfterwards(Index):
    """Removes and writes passages first, and then writes a complete manifest without a claim."""

    async def _write(self, changes, vectors, fresh, unreported):  # noqa: ARG002 - as above
        await self._make_searchable(changes, vectors)
        await self.index.store_vectors(fresh)
        for change in changes:
            change.manifest = completed(change.write.claim, now_ms=0)
        await self.index.put_manifests([ManifestWrite(one.manifest, one.found.replaces) for one in changes])
        return [(self._outcome(one), one.manifest) for one in changes]


class LetsAFailedVersionSupersede(Index):
    def _supersedes(self, outcome):  # noqa: ARG002 - the mistake
        return True


class OmitsUnreportedRemovals(Index):
    """Replaces a version whose index change was never produced, and names only what it removed itself."""

    async def _decide(self, task, found, unreported):  # noqa: ARG002 - the mistake
        return await super()._decide(task, found, ())


class SupersedesBeforeTheNewerChange(Index):
    """Reports a version as superseded without the change of the newer one, which follows in the stream."""

    def _superseded(self, task, manifest):
        return super()._superseded(task, manifest.model_copy(update={"position": task.message.position}))


class TreatsAClaimAsComplete(Index):
    """Lets an incomplete version supersede."""

    async def _found(self, keys):
        found_manifests = await self.index.stored_manifests(keys)
        begun = {
            key: Found(completed(one.manifest, now_ms=0), one.revision)
            for key, one in found_manifests.items()
            if not one.manifest.complete and one.manifest.writer != self.writer
        }
        return await super()._found([key for key in keys if key not in begun]) | begun


class LeavesClaimsOpenOnGivingUp(Index):
    """On giving up, ignores that positions are read from the index."""

    async def close(self, task, kind, reason):  # noqa: ARG002 - the mistake
        return None


class AdvancesOnlyForDoneEvents(Index):
    async def _advance(self, tasks):
        await super()._advance([task for task in tasks if task.message.outcome is None][-1:])


class OverwritesStoredPassages(Index):
    """Writes passages under the ids of stored ones with the same text, whose attributes cannot be restored."""

    async def _decide(self, task, found, unreported):
        change = await super()._decide(task, found, unreported)
        if hasattr(change, "write"):
            claim = change.write.claim
            stored = [self.index._written.get(name) for name in claim.removed]
            under = {one.write.chunk.text: name for one, name in zip(stored, claim.removed, strict=True) if one}
            over = {one.chunk_id: under.get(one.text, original_id(one.chunk_id)) for one in change.to_add}
            chunks = tuple(over.get(name, name) for name in claim.chunks)
            added = tuple(over[name] for name in claim.added)
            removed = tuple(name for name in claim.removed if name not in chunks)
            overwriting = claim.model_copy(update={"chunks": chunks, "added": added, "removed": removed})
            named = zip(change.passages, chunks, strict=True)
            change.passages = tuple(one.model_copy(update={"chunk_id": name}) for one, name in named)
            change.write = replace(change.write, claim=overwriting, remove=removed)
        return change


class IgnoresPassagesWithoutAManifest(WatchedIndex):
    async def passages(self, keys):  # noqa: ARG002 - the mistake
        return {}


class OmitsGroups(Index):
    async def _make_searchable(self, changes, vectors):
        for change in changes:
            change.passages = tuple(one.model_copy(update={"groups": ()}) for one in change.passages)
        await super()._make_searchable(changes, vectors)


class DropsNothing(Cache):
    async def commit(self, tenant, number, *, evaluated, epoch, drop, reason=b""):  # noqa: ARG002 - the mistake
        return await super().commit(tenant, number, evaluated=evaluated, epoch=epoch, drop=(), reason=reason)


class StoresWithAnyEpoch(Cache):
    async def store(self, tenant, key, entry, *, epoch, ttl_s, evidence=b""):  # noqa: ARG002 - as above
        await self._faults.before()
        mine = self._slice(tenant, 0)
        mine.fill += 1
        mine.answers.pop(key, None)
        mine.answers[key] = _Answer(mine.fill, mine.epoch, entry, evidence, self._now_us() + ttl_s * 1_000_000)
        return True


class AdvancesBeforeItDrops(Invalidate):
    """Publishes positions before it drops the answers that they make stale."""

    async def run(self, tasks):
        kept = [task.message.model_copy(update={"added": (), "removed": ()}) for task in tasks]
        first = [replace(task, message=message) for task, message in zip(tasks, kept, strict=True)]
        [_ async for _ in super().run(first)]
        async for outcomes in super().run(tasks):
            yield outcomes


class AnswersWithTwoVersions(Retrieval):
    """Returns passages without the version check."""

    async def _passages(self, fused, access, top_k, _written):
        passages, _ = await self._fetch(fused, access, top_k)
        return tuple(passages), True


class SearchesOnce(Retrieval):
    """Excludes the other version, but does not search again for missing passages of the selected one."""

    async def _passages(self, fused, access, top_k, written):
        passages, _ = await super()._passages(fused, access, top_k, written)
        return passages, True


class ReportsOnlyRecordedStates(EventStatuses):
    async def get(self, tenant, event_id):
        return await self.states.get(tenant, event_id)


class DiscardsFailedMessages(Notify):
    """Continues after a failed delivery without keeping the message."""

    async def _attempt(self, webhook, messages):
        attempt = await super()._attempt(webhook, messages)
        return replace(attempt, undelivered=())


class ReportsOutcomesBeforeDrops(Invalidate):
    """Sends the outcomes first."""

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
    "lets a failed version supersede": Parts(step=LetsAFailedVersionSupersede),
    "omits unreported removals": Parts(step=OmitsUnreportedRemovals),
    "supersedes before the newer change": Parts(step=SupersedesBeforeTheNewerChange),
    "treats a claim as complete": Parts(step=TreatsAClaimAsComplete),
    "leaves claims open on giving up": Parts(step=LeavesClaimsOpenOnGivingUp),
    "advances only for done events": Parts(step=AdvancesOnlyForDoneEvents),
    "overwrites stored passages": Parts(step=OverwritesStoredPassages),
    "ignores passages without a manifest": Parts(index=IgnoresPassagesWithoutAManifest),
    "omits groups": Parts(step=OmitsGroups),
    "drops nothing": Parts(cache=DropsNothing),
    "stores with any epoch": Parts(cache=StoresWithAnyEpoch),
    "answers with two versions": Parts(retrieval=AnswersWithTwoVersions, asks_per_s=30),
    "searches once": Parts(retrieval=SearchesOnce, asks_per_s=100),
    "reports only recorded states": Parts(statuses=ReportsOnlyRecordedStates),
    "advances before it drops": Parts(invalidate=AdvancesBeforeItDrops),
    "discards failed messages": Parts(notify=DiscardsFailedMessages),
    "reports outcomes before answers are dropped": Parts(invalidate=ReportsOutcomesBeforeDrops),
}
