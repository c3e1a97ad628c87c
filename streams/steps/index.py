"""chunks.v1 → index-changes.v1: embed new passages, make them searchable, remove old ones.

The order, and why a stop at any point is harmless:

1. Read the current manifests in real time; resolve open claims; determine what each version changes. Only completed
   versions supersede: of several versions with equal rights in a batch, the older ones wait until the newest is
   finished, and follow if it is given up or rejected.
2. Embed, then claim: write the manifests as incomplete, with the manifests that they replace. A claim that is rejected
   was based on an outdated manifest.
3. Write the new passages, all under unused ids; if the index accepts all of them, remove the old ones; refresh. Until
   then the old ones are served. If the index rejects one, remove the new ones.
4. Complete the manifests, or close the claims of rejected versions; advance the positions; produce the index changes. A
   change that was completed but not produced is produced when its record is delivered again.
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
from typing_extensions import override

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
    NothingToWrite,
    OwnedByOther,
    Superseded,
    Write,
    closed,
    completed,
    decide,
)
from streams.core.in_order import OrderedOutcomes
from streams.core.outcomes import DeadLetter, Finished, Outcome
from streams.core.planned_chunks import load_chunks
from streams.core.splitting import embedding_text
from streams.core.version_runs import next_versions, runs_of_plans
from streams.progress import ProgressReporter
from streams.recovery import Found, Recovery
from streams.runner import Step, Task
from streams.topology import StepName


@dataclass(slots=True)
class _Change:
    """A version that is being written to the index."""

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


_Result = tuple[Outcome, Manifest | None]
"""Outcome of a version, and the manifest of its document at that time; None if it was not read."""


@dataclass(frozen=True, slots=True)
class Index(Step):
    """The index step.

    Attributes:
        generation: index generation that is written.
        batch_chunks: maximum number of passages that are embedded and written at once; a change is never divided.
        report: receives the progress of events.
        writer: name of this worker in its claims.
    """

    index: DocumentIndex
    embedder: Embedder
    blobs: BlobStore
    generation: str
    batch_chunks: int
    report: ProgressReporter
    writer: str = field(default_factory=lambda: uuid.uuid4().hex)

    name = StepName.INDEX

    @override
    async def run(self, tasks: Sequence[Task]) -> AsyncGenerator[Sequence[Outcome], None]:
        plans = [cast("ChunkPlan", task.message) for task in tasks]
        versions = runs_of_plans(plans)
        unreported = frozenset(plan.position for plan in plans)
        outcomes = OrderedOutcomes()
        count = 0
        while waiting := [number for number in range(len(tasks)) if number not in outcomes]:
            older = next_versions(versions, waiting)
            async with aclosing(self._process({number: tasks[number] for number in older}, unreported)) as results:
                async for results_by_number in results:
                    for newest, (outcome, manifest) in results_by_number.items():
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

    @override
    def give_up(self, task: Task, reason: str) -> tuple[Record, ...]:
        return self._index_change(task, EventOutcome.DEAD_LETTER, reason).emit

    @override
    async def close(self, task: Task, kind: str, reason: str) -> Outcome | None:
        """Resolve an open claim, and record the version as given up."""
        plan = cast("ChunkPlan", task.message)
        outcome: Outcome | None = None
        while plan.outcome is None:
            found = (await self._found([plan.event.key]))[plan.event.key]
            manifest = found.manifest
            decision = decide(plan, (), manifest, now_ms=_now_ms(), lost=found.lost)
            if isinstance(decision, Write):
                manifest = closed(manifest, plan, kind, reason, now_ms=_now_ms())
                outcome = self._failed(task, manifest.failed[-1])
            else:
                outcome = self._final_outcome(task, decision)
            if manifest is found.manifest and found.saved:
                break
            if await self._put_manifest(cast("Manifest", manifest), found.replaces):
                break
        await self._advance([task])
        return outcome

    def _supersedes(self, outcome: Outcome) -> bool:
        """Whether an outcome supersedes the older versions of a run."""
        return not isinstance(outcome, DeadLetter)

    async def _advance(self, tasks: Sequence[Task]) -> None:
        """Advance the positions in the index, from which they are read if Redis has lost them.

        Tasks finish in the order of their lanes, so all earlier positions are finished.
        """
        positions: dict[tuple[str, int], int] = {}
        for plan in [cast("ChunkPlan", task.message) for task in tasks]:
            partition, offset = Position.parse(plan.position)
            lane = (plan.event.tenant, partition)
            positions[lane] = max(offset, positions.get(lane, offset))
        await self.index.advance(positions)

    async def _process(
        self, tasks: Mapping[int, Task], unreported: Collection[str]
    ) -> AsyncGenerator[dict[int, _Result], None]:
        """Outcomes by task number, as they become known; no two tasks are versions of one document."""
        plans = {number: cast("ChunkPlan", task.message) for number, task in tasks.items()}
        found = await self._found([plan.event.key for plan in plans.values() if plan.outcome is None])
        results_by_number: dict[int, _Result] = {}
        changes: dict[int, _Change] = {}
        for number, plan in plans.items():
            if plan.outcome is not None:
                results_by_number[number] = self._index_change(tasks[number], plan.outcome, plan.reason), None
                continue
            decided = await self._decide(tasks[number], found[plan.event.key], unreported)
            if isinstance(decided, _Change):
                changes[number] = decided
            else:
                results_by_number[number] = decided
        yield results_by_number
        async with aclosing(self._write_groups(changes, unreported)) as groups:
            async for group in groups:
                yield group

    async def _found(self, keys: Sequence[DocumentKey]) -> dict[DocumentKey, Found]:
        return await Recovery(self.index, self.writer).found(keys, now_ms=_now_ms())

    async def _decide(self, task: Task, found: Found, unreported: Collection[str]) -> _Change | _Result:
        plan = cast("ChunkPlan", task.message)
        try:
            chunks = plan.chunks if plan.chunks_blob is None else load_chunks(await self.blobs.get(plan.chunks_blob))
        except (BlobMissing, BlobCorrupt) as failure:
            return await self._dead_letter(task, "content-lost", str(failure)), None
        passages = stored_chunks(plan, chunks)
        ids = [passage.chunk_id for passage in passages]
        decision = decide(
            plan,
            ids,
            found.manifest,
            now_ms=_now_ms(),
            writer=self.writer,
            lost=found.lost,
            unreported=unreported,
        )
        if isinstance(decision, Write):
            pairs = zip(passages, decision.claim.chunks, strict=True)
            passages = tuple(passage.model_copy(update={"chunk_id": chunk_id}) for passage, chunk_id in pairs)
            return _Change(task, plan, passages, found, decision)
        if not found.saved and not await self._put_manifest(cast("Manifest", found.manifest), found.replaces):
            return await self._process_again(task, unreported)
        return self._final_outcome(task, decision), found.manifest

    def _final_outcome(self, task: Task, decision: NothingToWrite) -> Outcome:
        match decision:
            case Superseded():
                return self._superseded(task, decision.manifest)
            case AlreadyDone(manifest):
                return self._done(task, manifest)
            case AlreadyFailed(failure):
                return self._failed(task, failure)
            case OwnedByOther(owner):
                # The decision is repeated when the event is delivered again, so nothing has to be stored.
                event = cast("ChunkPlan", task.message).event
                reason = owner_refusal(event.document_id, owner, str(event.connector))
                return DeadLetter("owned-by-other", reason, self.give_up(task, reason))

    def _failed(self, task: Task, failure: FailedVersion) -> DeadLetter:
        # From its position on, no answer contains passages of it that searches may have found.
        index_change = self._index_change(task, EventOutcome.DEAD_LETTER, failure.reason, removed=failure.removed)
        return DeadLetter(failure.kind, failure.reason, index_change.emit)

    async def _dead_letter(self, task: Task, kind: str, reason: str) -> Outcome:
        return await self.close(task, kind, reason) or DeadLetter(kind, reason, self.give_up(task, reason))

    async def _process_again(self, task: Task, unreported: Collection[str]) -> _Result:
        """Process a task again after another writer has changed its document."""
        [result] = [one async for some in self._process({0: task}, unreported) for one in some.values()]
        return result

    async def _put_manifest(self, manifest: Manifest, replaces: Revision | None) -> bool:
        [written] = await self.index.put_manifests([ManifestWrite(manifest, replaces)])
        return written is not None

    async def _write_groups(
        self, changes: Mapping[int, _Change], unreported: Collection[str]
    ) -> AsyncGenerator[dict[int, _Result], None]:
        """Write in groups, in any order. While one group is written, the next one is embedded."""
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
            # No task of this attempt may run during the next one.
            if embedding is not None:
                embedding.cancel()
                await asyncio.gather(embedding, return_exceptions=True)

    async def _write(
        self,
        changes: Sequence[_Change],
        vectors: Mapping[str, Vector],
        fresh: Mapping[str, Vector],
        unreported: Collection[str],
    ) -> list[_Result]:
        # Only now: a version that cannot be embedded leaves no claim, and its document unchanged.
        claims = await self.index.put_manifests(
            [ManifestWrite(change.write.claim, change.found.replaces) for change in changes]
        )
        claimed_changes = [(change, claim) for change, claim in zip(changes, claims, strict=True) if claim is not None]
        # Concurrently: a lost vector costs only another embedding.
        await asyncio.gather(
            self._make_searchable([change for change, _ in claimed_changes], vectors), self.index.store_vectors(fresh)
        )
        done = await self._complete(claimed_changes)
        return [
            (self._outcome(change), change.manifest)
            if id(change) in done
            else await self._process_again(change.task, unreported)
            for change in changes
        ]

    async def _embed(self, changes: Sequence[_Change], vectors: dict[str, Vector]) -> dict[str, Vector]:
        """Add the missing vectors of the changes' new passages to ``vectors``, by ``text_sha256``.

        Returns:
            Vectors that were not stored and had to be embedded, by storage key.
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
        # Invalid vectors are ignored: the index would reject their texts at every attempt.
        valid = {key: vector for key, vector in stored.items() if _is_valid(vector, dimension)}
        vectors |= {sha256: valid[key] for sha256, key in keys.items() if key in valid}
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
        """Complete the changes whose claims are still valid; returns these changes by identity."""
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
        # Only a plan without chunks has a reason: why the version has no passages.
        reason = cast("ChunkPlan", task.message).reason
        return self._index_change(
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
        return self._index_change(
            task,
            EventOutcome.SUPERSEDED,
            f"version {plan.event.version} is not newer than version {manifest.version}",
            added=manifest.added if follows else (),
            removed=manifest.removed if follows else (),
            deleted=follows and manifest.state is LifeState.DELETED,
        )

    def _index_change(
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


def _groups(changes: Mapping[int, _Change], max_chunks: int) -> list[dict[int, _Change]]:
    """The changes in order, in groups of at most ``max_chunks`` new passages or of a single change."""
    groups: list[dict[int, _Change]] = []
    size = 0
    for number, change in changes.items():
        size += len(change.write.add)
        if not groups or size > max_chunks:
            groups.append({})
            size = len(change.write.add)
        groups[-1][number] = change
    return groups


def _chunk_change(change: _Change, vectors: Mapping[str, Vector]) -> ChunkChange:
    claim = change.write.claim
    put = tuple(ChunkWrite(passage, vectors[passage.text_sha256]) for passage in change.to_add)
    return ChunkChange(claim.key, claim.write_version, put, change.write.remove)


def _is_valid(vector: Vector, dimension: int) -> bool:
    return vector.shape == (dimension,) and bool(np.isfinite(vector).all())


def _now_ms() -> float:
    return time.time() * 1000
