"""chunks.v1 → index-changes.v1: embed what is new, make it searchable, take away what is gone.

The order, and why a stop anywhere is harmless:

1. Read the standing manifests in real time; settle claims that stand; decide what each version changes. Only what has
   completed supersedes: of versions that come together with equal rights, older ones wait until the newest is through,
   and are next if it is given up or refused.
2. Embed, then claim: write the manifests as incomplete, with what they replace. A claim that is refused belongs to a
   writer that knew of an older state.
3. Write the new passages, all under ids under which nothing stands; if the index takes all of them, remove the old
   ones; refresh. Until then the old ones serve. If it refuses one, remove the new ones.
4. Complete the manifests, or close the claims of what was refused; advance the positions; produce the index changes. A
   change that was completed but not produced is produced when its record comes again.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import cast

import numpy as np

from infra.blobs.port import BlobCorrupt, BlobMissing, BlobStore
from infra.embedding.port import Embedder
from infra.kafka.codec import encode_change
from infra.opensearch.port import ChunkChange, ChunkWrite, DocumentIndex, ManifestWrite, Revision
from schemas.documents import DocumentKey, LifeState, Stage
from schemas.documents import Outcome as EventOutcome
from schemas.events import ChunkPlan, IndexChange, StageTimes
from schemas.index import FailedVersion, Manifest, StoredChunk
from schemas.ownership import owner_refusal
from schemas.positions import Position
from schemas.records import Record
from schemas.search import Vector
from streams.core.chunk_identity import stored_chunks
from streams.core.document_change import (
    AlreadyDone,
    AlreadyFailed,
    OwnedByOther,
    Settled,
    Superseded,
    Write,
    closed,
    completed,
    decide,
)
from streams.core.in_order import InOrder
from streams.core.outcomes import DeadLetter, Finished, Outcome
from streams.core.planned_chunks import load_chunks
from streams.core.splitting import embedding_text
from streams.core.version_runs import next_versions, runs_of_plans
from streams.progress import ProgressLog
from streams.recovery import Found, Recovery
from streams.runner import Task
from streams.topology import StepName


@dataclass(slots=True)
class _Change:
    """A version on its way into the index."""

    task: Task
    plan: ChunkPlan
    passages: tuple[StoredChunk, ...]
    found: Found
    write: Write
    embedded_ms: float = 0.0
    searchable_ms: float = 0.0
    refusal: str | None = None
    manifest: Manifest | None = None

    @property
    def to_add(self) -> list[StoredChunk]:
        return [self.passages[number] for number in self.write.add]


_Ended = tuple[Outcome, Manifest | None]
"""How a version ended, and the manifest of its document then; None where it was not read."""


@dataclass(frozen=True, slots=True)
class Index:
    """The step.

    Attributes:
        generation: index generation that is written.
        batch_chunks: most passages that are embedded and written at once; a change is never divided.
        report: told when an event is embedded and when it is searchable.
        writer: names this worker in its claims.
    """

    index: DocumentIndex
    embedder: Embedder
    blobs: BlobStore
    generation: str
    batch_chunks: int
    report: ProgressLog
    writer: str = field(default_factory=lambda: uuid.uuid4().hex)

    name = StepName.INDEX

    async def run(self, tasks: Sequence[Task]) -> AsyncGenerator[Sequence[Outcome], None]:
        """See ``Step.run``."""
        plans = [cast("ChunkPlan", task.message) for task in tasks]
        versions = runs_of_plans(plans)
        unreported = frozenset(plan.position for plan in plans)
        outcomes = InOrder()
        count = 0
        while waiting := [number for number in range(len(tasks)) if number not in outcomes]:
            older = next_versions(versions, waiting)
            async with aclosing(self._ended({number: tasks[number] for number in older}, unreported)) as results:
                async for ended in results:
                    for newest, (outcome, manifest) in ended.items():
                        outcomes.add({newest: outcome})
                        for number in older[newest]:
                            if plans[number].position == plans[newest].position:
                                # A second delivery of the same event. It follows the first, which has the outcome.
                                outcomes.add({number: Finished()})
                            elif self._supersedes(outcome):
                                outcomes.add({number: self._superseded(tasks[number], cast("Manifest", manifest))})
                    if ready := outcomes.ready():
                        await self._advance(tasks[count : count + len(ready)])
                        count += len(ready)
                        yield ready

    def give_up(self, task: Task, reason: str) -> tuple[Record, ...]:
        """See ``Step.give_up``."""
        return self._news(task, EventOutcome.DEAD_LETTER, reason).emit

    async def close(self, task: Task, kind: str, reason: str) -> Outcome | None:
        """See ``Step.close``: settles a claim that stands, and remembers the version as one that was given up."""
        plan = cast("ChunkPlan", task.message)
        ended: Outcome | None = None
        while plan.outcome is None:
            found = (await self._found([plan.event.key]))[plan.event.key]
            manifest = found.manifest
            decision = decide(plan, (), manifest, now_ms=_now_ms(), lost=found.lost)
            if isinstance(decision, Write):
                manifest = closed(manifest, plan, kind, reason, now_ms=_now_ms())
                ended = self._failed(task, manifest.failed[-1])
            else:
                ended = self._ended_before(task, decision)
            if manifest is found.manifest and found.saved:
                break
            if await self._put(cast("Manifest", manifest), found.replaces):
                break
        await self._advance([task])
        return ended

    def _supersedes(self, outcome: Outcome) -> bool:
        """Whether versions before the one that ended like this need not be processed: it is there in their place."""
        return not isinstance(outcome, DeadLetter)

    async def _advance(self, tasks: Sequence[Task]) -> None:
        """Note how far everything has ended, so that it can be read where Redis has lost it.

        Tasks end in the order of their lanes, so whatever is below them has ended.
        """
        positions: dict[tuple[str, int], int] = {}
        for plan in [cast("ChunkPlan", task.message) for task in tasks]:
            partition, offset = Position.parse(plan.position)
            lane = (plan.event.tenant, partition)
            positions[lane] = max(offset, positions.get(lane, offset))
        await self.index.advance(positions)

    async def _ended(
        self, tasks: Mapping[int, Task], unreported: Collection[str]
    ) -> AsyncGenerator[dict[int, _Ended], None]:
        """How tasks end, by their numbers, as that becomes known; no two are versions of one document."""
        plans = {number: cast("ChunkPlan", task.message) for number, task in tasks.items()}
        found = await self._found([plan.event.key for plan in plans.values() if plan.outcome is None])
        ended: dict[int, _Ended] = {}
        changes: dict[int, _Change] = {}
        for number, plan in plans.items():
            if plan.outcome is not None:
                ended[number] = self._news(tasks[number], plan.outcome, plan.reason), None
                continue
            decided = await self._decide(tasks[number], found[plan.event.key], unreported)
            if isinstance(decided, _Change):
                changes[number] = decided
            else:
                ended[number] = decided
        yield ended
        async with aclosing(self._written(changes, unreported)) as groups:
            async for group in groups:
                yield group

    async def _found(self, keys: Sequence[DocumentKey]) -> dict[DocumentKey, Found]:
        return await Recovery(self.index, self.writer).found(keys, now_ms=_now_ms())

    async def _decide(self, task: Task, found: Found, unreported: Collection[str]) -> _Change | _Ended:
        plan = cast("ChunkPlan", task.message)
        try:
            chunks = plan.chunks if plan.chunks_blob is None else load_chunks(await self.blobs.get(plan.chunks_blob))
        except (BlobMissing, BlobCorrupt) as failure:
            return await self._given_up(task, "content-lost", str(failure)), None
        passages = stored_chunks(plan, chunks)
        names = [passage.chunk_id for passage in passages]
        decision = decide(
            plan,
            names,
            found.manifest,
            now_ms=_now_ms(),
            writer=self.writer,
            lost=found.lost,
            unreported=unreported,
        )
        if isinstance(decision, Write):
            named = zip(passages, decision.claim.chunks, strict=True)
            passages = tuple(passage.model_copy(update={"chunk_id": name}) for passage, name in named)
            return _Change(task, plan, passages, found, decision)
        if not found.saved and not await self._put(cast("Manifest", found.manifest), found.replaces):
            return await self._again(task, unreported)
        return self._ended_before(task, decision), found.manifest

    def _ended_before(self, task: Task, decision: Settled) -> Outcome:
        match decision:
            case Superseded():
                return self._superseded(task, decision.manifest)
            case AlreadyDone(manifest):
                return self._done(task, manifest)
            case AlreadyFailed(failure):
                return self._failed(task, failure)
            case OwnedByOther(owner):
                # It is decided anew whenever the event comes again, so nothing is to be remembered of it.
                event = cast("ChunkPlan", task.message).event
                reason = owner_refusal(event.document_id, owner, str(event.connector))
                return DeadLetter("owned-by-other", reason, self.give_up(task, reason))

    def _failed(self, task: Task, failure: FailedVersion) -> DeadLetter:
        # What searches may have found of it is in no answer any more, from its position on.
        news = self._news(task, EventOutcome.DEAD_LETTER, failure.reason, removed=failure.removed)
        return DeadLetter(failure.kind, failure.reason, news.emit)

    async def _given_up(self, task: Task, kind: str, reason: str) -> Outcome:
        return await self.close(task, kind, reason) or DeadLetter(kind, reason, self.give_up(task, reason))

    async def _again(self, task: Task, unreported: Collection[str]) -> _Ended:
        """Somebody else was there meanwhile. What stands now tells what became of the task."""
        [ended] = [one async for some in self._ended({0: task}, unreported) for one in some.values()]
        return ended

    async def _put(self, manifest: Manifest, replaces: Revision | None) -> bool:
        [written] = await self.index.put_manifests([ManifestWrite(manifest, replaces)])
        return written is not None

    async def _written(
        self, changes: Mapping[int, _Change], unreported: Collection[str]
    ) -> AsyncGenerator[dict[int, _Ended], None]:
        """Write in groups: while one is written, the next is embedded, so that the model does not wait for the index.

        The groups have no order among them that matters, as no two changes are of one document.
        """
        groups = _groups(changes, self.batch_chunks)
        vectors: dict[str, Vector] = {}
        embedding = asyncio.create_task(self._embed(list(groups[0].values()), vectors)) if groups else None
        try:
            for group, following in zip_longest(groups, groups[1:]):
                fresh = await cast("asyncio.Task[dict[str, Vector]]", embedding)
                if following:
                    embedding = asyncio.create_task(self._embed(list(following.values()), vectors))
                yield dict(zip(group, await self._write(list(group.values()), vectors, fresh, unreported), strict=True))
        finally:
            # Nothing of this try may go on beside the next one.
            if embedding is not None:
                embedding.cancel()
                await asyncio.gather(embedding, return_exceptions=True)

    async def _write(
        self,
        changes: Sequence[_Change],
        vectors: Mapping[str, Vector],
        fresh: Mapping[str, Vector],
        unreported: Collection[str],
    ) -> list[_Ended]:
        # Only now: what cannot be embedded leaves no claim behind, so its document is as it was.
        claims = await self.index.put_manifests(
            [ManifestWrite(change.write.claim, change.found.replaces) for change in changes]
        )
        mine = [(change, claim) for change, claim in zip(changes, claims, strict=True) if claim is not None]
        # Fresh vectors are kept beside the way and not on it: losing one costs an embedding, nothing else.
        await asyncio.gather(
            self._make_searchable([change for change, _ in mine], vectors), self.index.store_vectors(fresh)
        )
        done = await self._complete(mine)
        return [
            (self._outcome(change), change.manifest)
            if id(change) in done
            else await self._again(change.task, unreported)
            for change in changes
        ]

    async def _embed(self, changes: Sequence[_Change], vectors: dict[str, Vector]) -> dict[str, Vector]:
        """Add to ``vectors``, by ``text_sha256``, what the changes' new passages lack.

        Only what was never embedded is embedded; that is returned, by its storage key.
        """
        wanted = {
            chunk.text_sha256: embedding_text(change.plan.title, chunk)
            for change in changes
            for chunk in change.to_add
            if chunk.text_sha256 not in vectors
        }
        keys = {sha256: f"{self.embedder.model.fingerprint}:{sha256}" for sha256 in wanted}
        stored = await self.index.stored_vectors(list(keys.values()))
        dimension = self.embedder.model.dimension
        # One that is not of the model is as good as none: it would make the index refuse its text for ever.
        usable = {key: vector for key, vector in stored.items() if _is_sound(vector, dimension)}
        vectors |= {sha256: usable[key] for sha256, key in keys.items() if key in usable}
        missing = [sha256 for sha256 in wanted if sha256 not in vectors]
        fresh: dict[str, Vector] = {}
        if missing:
            matrix = await self.embedder.embed_passages([wanted[sha256] for sha256 in missing])
            if matrix.shape != (len(missing), dimension) or not np.isfinite(matrix).all():
                raise ValueError(f"the model returned vectors of shape {matrix.shape}, or not all finite")
            vectors |= zip(missing, matrix, strict=True)
            fresh = {keys[sha256]: vectors[sha256] for sha256 in missing}
        now_ms = _now_ms()
        for change in changes:
            change.embedded_ms = now_ms
            self.report.reached(change.plan.event, Stage.EMBEDDED, now_ms)
        return fresh

    async def _make_searchable(self, changes: Sequence[_Change], vectors: Mapping[str, Vector]) -> None:
        refusals = await self.index.apply([_chunk_change(change, vectors) for change in changes])
        now_ms = _now_ms()
        for change, refusal in zip(changes, refusals, strict=True):
            change.refusal, change.searchable_ms = refusal, now_ms
            if refusal is None:
                self.report.reached(change.plan.event, Stage.SEARCHABLE, now_ms)

    async def _complete(self, claimed: Sequence[tuple[_Change, Revision]]) -> set[int]:
        """Complete what is still ours to complete; return which changes that are, by identity."""
        now_ms = _now_ms()
        completions = []
        for change, revision in claimed:
            claim = change.write.claim
            if change.refusal is None:
                change.manifest = completed(claim, now_ms=now_ms)
            else:
                change.manifest = closed(
                    claim.previous, change.plan, "refused", change.refusal, now_ms=now_ms, refused=claim
                )
            completions.append(ManifestWrite(change.manifest, revision))
        put = await self.index.put_manifests(completions)
        return {id(change) for (change, _), written in zip(claimed, put, strict=True) if written is not None}

    def _outcome(self, change: _Change) -> Outcome:
        manifest = cast("Manifest", change.manifest)
        if change.refusal is not None:
            return self._failed(change.task, manifest.failed[-1])
        times = StageTimes(
            accepted_ms=change.plan.event.accepted_ms,
            chunked_ms=change.plan.chunked_ms,
            embedded_ms=change.embedded_ms,
            searchable_ms=change.searchable_ms,
        )
        return self._done(change.task, manifest, times)

    def _done(self, task: Task, manifest: Manifest, times: StageTimes | None = None) -> Finished:
        # Only a plan without chunks has a reason here: why the version has no passages.
        reason = cast("ChunkPlan", task.message).reason
        return self._news(
            task,
            EventOutcome.DONE,
            reason,
            passages=len(manifest.chunks),
            added=manifest.added,
            removed=manifest.removed,
            deleted=manifest.state is LifeState.DELETED,
            times=times,
        )

    def _superseded(self, task: Task, manifest: Manifest) -> Finished:
        plan = cast("ChunkPlan", task.message)
        # The index change of a version that follows in the stream is not produced yet. This one names its passages as
        # well, so that no position is reached before its content.
        follows = Position.parse(manifest.position) > Position.parse(plan.position)
        return self._news(
            task,
            EventOutcome.SUPERSEDED,
            f"version {plan.event.version} is not newer than version {manifest.version}",
            added=manifest.added if follows else (),
            removed=manifest.removed if follows else (),
            deleted=follows and manifest.state is LifeState.DELETED,
        )

    def _news(
        self,
        task: Task,
        outcome: EventOutcome,
        reason: str | None = None,
        *,
        passages: int | None = None,
        added: tuple[str, ...] = (),
        removed: tuple[str, ...] = (),
        deleted: bool = False,
        times: StageTimes | None = None,
    ) -> Finished:
        plan = cast("ChunkPlan", task.message)
        event = plan.event
        change = IndexChange(
            event_id=event.event_id,
            tenant=event.tenant,
            document_id=event.document_id,
            version=event.version,
            position=plan.position,
            generation=self.generation,
            outcome=outcome,
            reason=reason,
            passages=passages,
            added=added,
            removed=removed,
            deleted=deleted,
            times=times or StageTimes(accepted_ms=event.accepted_ms, chunked_ms=plan.chunked_ms),
        )
        return Finished((encode_change(change, task.partition, task.traceparent),))


def _groups(changes: Mapping[int, _Change], most_chunks: int) -> list[dict[int, _Change]]:
    """The changes in order, in groups that add at most so many passages, or have one change."""
    groups: list[dict[int, _Change]] = []
    size = 0
    for number, change in changes.items():
        size += len(change.write.add)
        if not groups or size > most_chunks:
            groups.append({})
            size = len(change.write.add)
        groups[-1][number] = change
    return groups


def _chunk_change(change: _Change, vectors: Mapping[str, Vector]) -> ChunkChange:
    claim = change.write.claim
    put = tuple(ChunkWrite(passage, vectors[passage.text_sha256]) for passage in change.to_add)
    return ChunkChange(claim.key, claim.write_version, put, change.write.remove)


def _is_sound(vector: Vector, dimension: int) -> bool:
    return vector.shape == (dimension,) and bool(np.isfinite(vector).all())


def _now_ms() -> float:
    return time.time() * 1000
