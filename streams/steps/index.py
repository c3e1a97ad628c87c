"""chunks.v1 → index-changes.v1: embed what is new, make it searchable, take away what is gone.

The order, and why a stop anywhere is harmless:

1. Read the standing manifests in real time and decide what each version changes.
2. Embed, then claim: write the manifests as incomplete. A claim that is refused belongs to a version that is not the
   newest. Whoever finds an incomplete claim knows every passage that may or may not be there.
3. Write the new passages; if the index takes all of them, remove the old ones; refresh. Until then the old ones serve.
4. Complete the manifests, and produce the index changes: each may come first. A change that was completed but not
   produced is produced when its record comes again.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import zip_longest
from typing import cast

import numpy as np

from infra.blobs.port import BlobCorrupt, BlobMissing, BlobStore
from infra.embedding.port import Embedder, Vector
from infra.kafka.codec import encode_change
from infra.kafka.port import Record
from infra.opensearch.port import ChunkChange, ChunkWrite, DocumentIndex, ManifestWrite, Revision, Standing
from schemas.documents import Outcome as EventOutcome
from schemas.documents import Stage
from schemas.events import Change, ChunkPlan, IndexChange, StageTimes
from schemas.index import Manifest, StoredChunk
from schemas.ownership import owner_refusal
from streams.core.chunk_identity import stored_chunks
from streams.core.document_change import (
    AlreadyDone,
    OwnedByOther,
    Superseded,
    Write,
    completed,
    decide,
    refused,
    runs,
    supersede_within,
)
from streams.core.in_order import InOrder
from streams.core.outcomes import DeadLetter, Finished, Outcome
from streams.core.planned_chunks import load_chunks
from streams.core.splitting import embedding_text
from streams.progress import ProgressLog
from streams.runner import Task
from streams.topology import StepName


@dataclass(slots=True)
class _Change:
    """A version on its way into the index."""

    task: Task
    plan: ChunkPlan
    passages: tuple[StoredChunk, ...]
    standing: Standing | None
    write: Write
    embedded_ms: float = 0.0
    searchable_ms: float = 0.0
    refusal: str | None = None

    @property
    def to_add(self) -> list[StoredChunk]:
        return [self.passages[number] for number in self.write.add]


@dataclass(frozen=True, slots=True)
class Index:
    """The step.

    Attributes:
        generation: index generation that is written.
        batch_chunks: most passages that are embedded and written at once; a change is never divided.
        report: told when an event is embedded and when it is searchable.
    """

    index: DocumentIndex
    embedder: Embedder
    blobs: BlobStore
    generation: str
    batch_chunks: int
    report: ProgressLog

    name = StepName.INDEX

    async def run(self, tasks: Sequence[Task]) -> AsyncGenerator[Sequence[Outcome], None]:
        """See ``Step.run``."""
        plans = [cast("ChunkPlan", task.message) for task in tasks]
        versions = _versions(plans)
        newer = supersede_within(versions)
        taken = {
            number: task for number, (task, version) in enumerate(zip(tasks, newer, strict=True)) if version is None
        }
        older: dict[object, list[int]] = defaultdict(list)
        for number, version in enumerate(newer):
            if version is not None:
                older[versions[number][0]].append(number)
        told = InOrder()
        async with aclosing(self._in_turn(taken)) as results:
            async for ended in results:
                told.end(ended)
                for newest in ended:
                    for number in older.pop(versions[newest][0], ()):
                        news = self._superseded(tasks[number], Superseded(plans[newest].event.version)).emit
                        # Of the same event, delivered twice, the news is told already, and is not this.
                        same = plans[number].position == plans[newest].position
                        told.end_with(number, newest, *(() if same else news))
                if ready := told.ready():
                    yield ready

    def give_up(self, task: Task, reason: str) -> tuple[Record, ...]:
        """See ``Step.give_up``."""
        return self._news(task, EventOutcome.DEAD_LETTER, reason).emit

    async def _in_turn(self, tasks: Mapping[int, Task]) -> AsyncGenerator[dict[int, Outcome], None]:
        """As ``_ended``; of one document one after the other, since the first may change who owns it."""
        waiting = dict(tasks)
        while waiting:
            first: dict[object, int] = {}
            for number, task in waiting.items():
                plan = cast("ChunkPlan", task.message)
                first.setdefault(plan.event.key if plan.outcome is None else number, number)
            async with aclosing(self._ended({number: waiting.pop(number) for number in first.values()})) as results:
                async for ended in results:
                    yield ended

    async def _ended(self, tasks: Mapping[int, Task]) -> AsyncGenerator[dict[int, Outcome], None]:
        """How tasks end, by their numbers, as that becomes known; no two are versions of one document."""
        plans = {number: cast("ChunkPlan", task.message) for number, task in tasks.items()}
        standing = await self.index.standing([plan.event.key for plan in plans.values() if plan.outcome is None])
        outcomes: dict[int, Outcome] = {}
        changes: dict[int, _Change] = {}
        for number, plan in plans.items():
            if plan.outcome is not None:
                outcomes[number] = self._news(tasks[number], plan.outcome, plan.reason)
                continue
            decided = await self._decide(tasks[number], standing.get(plan.event.key))
            if isinstance(decided, _Change):
                changes[number] = decided
            else:
                outcomes[number] = decided
        yield outcomes
        async with aclosing(self._written(changes)) as groups:
            async for group in groups:
                yield group

    async def _decide(self, task: Task, standing: Standing | None) -> _Change | Outcome:
        plan = cast("ChunkPlan", task.message)
        try:
            chunks = plan.chunks if plan.chunks_blob is None else load_chunks(await self.blobs.get(plan.chunks_blob))
        except (BlobMissing, BlobCorrupt) as failure:
            return DeadLetter("content-lost", str(failure), self.give_up(task, str(failure)))
        manifest = standing.manifest if standing else None
        strays: tuple[str, ...] = ()
        if manifest is None and plan.event.change is Change.DELETED:
            # It was never there, or its manifest was lost: what is deleted must be gone all the same (I2).
            strays = await self.index.chunk_ids(plan.event.key)
        passages = stored_chunks(plan, chunks)
        names = [passage.chunk_id for passage in passages]
        decision = decide(plan, names, manifest, now_ms=_now_ms(), strays=strays)
        match decision:
            case Superseded():
                return self._superseded(task, decision)
            case AlreadyDone(manifest):
                return self._repeated(task, manifest)
            case OwnedByOther(owner):
                reason = owner_refusal(plan.event.document_id, owner, str(plan.event.connector))
                return DeadLetter("owned-by-other", reason, self.give_up(task, reason))
            case Write():
                return _Change(task, plan, passages, standing, decision)

    async def _written(self, changes: Mapping[int, _Change]) -> AsyncGenerator[dict[int, Outcome], None]:
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
                yield dict(zip(group, await self._write(list(group.values()), vectors, fresh), strict=True))
        finally:
            # Nothing of this try may go on beside the next one.
            if embedding is not None:
                embedding.cancel()
                await asyncio.gather(embedding, return_exceptions=True)

    async def _write(
        self, changes: Sequence[_Change], vectors: Mapping[str, Vector], fresh: Mapping[str, Vector]
    ) -> list[Outcome]:
        # Only now: what cannot be embedded leaves no claim behind, so its document is as it was.
        claims = await self.index.put_manifests(
            [
                ManifestWrite(change.write.claim, change.standing.revision if change.standing else None)
                for change in changes
            ]
        )
        mine = [(change, claim) for change, claim in zip(changes, claims, strict=True) if claim is not None]
        # Fresh vectors are kept beside the way and not on it: losing one costs an embedding, nothing else.
        await asyncio.gather(
            self._make_searchable([change for change, _ in mine], vectors), self.index.store_vectors(fresh)
        )
        done = await self._complete(mine)
        # Somebody else was there meanwhile: a newer version, or another worker with this one. What stands now tells
        # what became of it.
        overtaken = [change.task for change in changes if id(change) not in done]
        again = iter([outcome async for some in self.run(overtaken) for outcome in some] if overtaken else ())
        return [self._outcome(change) if id(change) in done else next(again) for change in changes]

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
        for change, claim in claimed:
            standing = change.standing.manifest if change.standing else None
            if change.refusal is None:
                completion = completed(change.write.claim, now_ms=now_ms)
            else:
                completion = refused(change.write.claim, standing, change.refusal, now_ms=now_ms)
            completions.append(ManifestWrite(completion, claim))
        put = await self.index.put_manifests(completions)
        return {id(change) for (change, _), written in zip(claimed, put, strict=True) if written is not None}

    def _outcome(self, change: _Change) -> Outcome:
        if change.refusal is not None:
            return DeadLetter("refused", change.refusal, self.give_up(change.task, change.refusal))
        claim = change.write.claim
        times = StageTimes(
            accepted_ms=change.plan.event.accepted_ms,
            chunked_ms=change.plan.chunked_ms,
            embedded_ms=change.embedded_ms,
            searchable_ms=change.searchable_ms,
        )
        return self._done(change.task, claim, times)

    def _repeated(self, task: Task, manifest: Manifest) -> Outcome:
        """The news of a change that is complete already; what it changed is in the manifest."""
        if manifest.failure is not None:
            return DeadLetter("refused", manifest.failure, self.give_up(task, manifest.failure))
        return self._done(task, manifest)

    def _done(self, task: Task, manifest: Manifest, times: StageTimes | None = None) -> Finished:
        # Only a plan without chunks has a reason here: why the version has no passages.
        reason = cast("ChunkPlan", task.message).reason
        return self._news(task, EventOutcome.DONE, reason, manifest=manifest, times=times)

    def _superseded(self, task: Task, superseded: Superseded) -> Finished:
        version = cast("ChunkPlan", task.message).event.version
        reason = f"version {version} is not newer than version {superseded.by_version}"
        return self._news(task, EventOutcome.SUPERSEDED, reason)

    def _news(
        self,
        task: Task,
        outcome: EventOutcome,
        reason: str | None = None,
        *,
        manifest: Manifest | None = None,
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
            passages=len(manifest.chunks) if manifest else None,
            added=manifest.added if manifest else (),
            removed=manifest.removed if manifest else (),
            deleted=outcome is EventOutcome.DONE and event.change is Change.DELETED,
            times=times or StageTimes(accepted_ms=event.accepted_ms, chunked_ms=plan.chunked_ms),
        )
        return Finished((encode_change(change, task.partition, task.traceparent),))


def _versions(plans: Sequence[ChunkPlan]) -> list[tuple[object, int]]:
    """What supersedes what: versions that are on their way in one run; an event that has ended is for itself."""
    under_way = iter(runs([plan.event for plan in plans if plan.outcome is None]))
    return [(next(under_way) if plan.outcome is None else plan.position, plan.event.version) for plan in plans]


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
