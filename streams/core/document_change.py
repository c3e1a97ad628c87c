"""Determines what a document version changes in the index, given the current manifest.

This module decides I1 (newer wins), I2 (no resurrection) and I6 (replay is harmless). Only completed versions count:
claims are resolved before (``streams.recovery``), and a version that was given up changes nothing.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from schemas.documents import DocumentKey, LifeState
from schemas.events import Change, ChunkPlan, DocumentEvent
from schemas.index import (
    FENCES_PER_VERSION,
    MAX_FAILED_VERSIONS,
    MAX_GONE,
    NEVER_COMPLETED,
    FailedVersion,
    Manifest,
    StoredChunk,
    original_id,
)
from schemas.ownership import other_owner
from schemas.positions import Position
from streams.core.chunk_copies import copy_id


@dataclass(frozen=True, slots=True)
class Write:
    """The version is the newest one and has to be written.

    Attributes:
        claim: manifest to write before any passage.
        add: indices of the planned chunks to write, in order. No passage is stored under their ids.
        remove: ids of passages to remove.
    """

    claim: Manifest
    add: tuple[int, ...]
    remove: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Superseded:
    """A newer version is searchable; nothing is written."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class AlreadyDone:
    """This version is searchable; only its index change may be missing."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class OwnedByOther:
    """The event is from a connector, and another connector owns the live document. It changes nothing."""

    owner: str


@dataclass(frozen=True, slots=True)
class AlreadyFailed:
    """This event was given up; only its index change may be missing."""

    failure: FailedVersion


NothingToWrite = Superseded | AlreadyDone | AlreadyFailed | OwnedByOther
"""Why a version has nothing to write."""


def decide(
    plan: ChunkPlan,
    chunk_ids: Sequence[str],
    current: Manifest | None,
    *,
    now_ms: float,
    writer: str = "",
    lost: bool = False,
    unreported: Collection[str] = (),
) -> Write | NothingToWrite:
    """Compare a plan with the searchable version.

    Args:
        plan: the document version, parsed and split.
        chunk_ids: id of each planned chunk, derived from all its stored content; empty for a delete.
        current: the current manifest, read in real time and complete; or None.
        now_ms: epoch milliseconds of the claim.
        writer: name of the worker that will write.
        lost: the manifest is missing, and ``current`` was rebuilt from the stored passages, which may belong to an
            unfinished change.
        unreported: positions of events whose index change may not be produced yet. If this version replaces one of
            them, its own index change also names the passages that the replaced one removed.
    """
    nothing = _nothing_to_write(plan, current, lost=lost)
    if nothing is not None:
        return nothing
    claim = _claim(plan, current, writer=writer, now_ms=now_ms)
    claim = claim.model_copy(update={"gone": _unreported_removals(current, unreported)})
    rewrites = plan.event.rewrite or lost
    existing = {original_id(chunk_id): chunk_id for chunk_id in (current.chunks if current else ())}
    # The stored passages are not trusted, and not overwritten. An unused id is not sufficient: the index may remember a
    # later removal of an id that was used before, and reject the passage.
    writing = f"{plan.position} {claim.write_version}"
    ids: list[str] = []
    add: list[int] = []
    for number, chunk_id in enumerate(chunk_ids):
        if not rewrites and chunk_id in existing:
            ids.append(existing[chunk_id])
        else:
            ids.append(copy_id(chunk_id, writing) if rewrites else chunk_id)
            add.append(number)
    wanted = frozenset(ids)
    # In the order of the manifest, so that equal inputs yield equal plans.
    remove = tuple(chunk_id for chunk_id in (current.chunks if current else ()) if chunk_id not in wanted)
    added = tuple(ids[number] for number in add)
    changed = {"chunks": tuple(ids), "added": added, "removed": remove}
    return Write(claim.model_copy(update=changed), tuple(add), remove)


def completed(claim: Manifest, *, now_ms: float) -> Manifest:
    """The manifest after the claim's passages have become searchable."""
    return claim.model_copy(
        update={
            "complete": True,
            "removed": _distinct((*claim.removed, *claim.gone), but=claim.chunks),
            "gone": (),
            "previous": None,
            "writer": None,
            "failed": tuple(one for one in claim.failed if one.version > claim.version),
            "updated_ms": now_ms,
        }
    )


def rolled_forward(claim: Manifest, *, now_ms: float) -> Manifest:
    """The manifest of a claim that another worker completes. Only the claim's passages are searchable."""
    manifest = completed(claim, now_ms=now_ms)
    # The event may be reported as superseded by the next version, which then has to report these removals too.
    return manifest.model_copy(update={"gone": manifest.removed})


def rolled_back(claim: Manifest, *, now_ms: float) -> Manifest:
    """The manifest after a claim was undone: the manifest before it, with the fence of the claim."""
    before = claim.previous or _empty_manifest(claim.key, claim.position, claim.profile, now_ms=now_ms)
    gone = _distinct((*claim.gone, *claim.added), but=before.chunks)
    return before.model_copy(update={"failed": claim.failed, "gone": gone, "fence": claim.write_version})


def closed(
    current: Manifest | None,
    plan: ChunkPlan,
    kind: str,
    reason: str,
    *,
    now_ms: float,
    refused: Manifest | None = None,
) -> Manifest:
    """The manifest after a version was given up: the searchable version stays (I3), and nothing is superseded.

    Args:
        current: the searchable version, complete; or None.
        plan: plan of the version.
        kind: kind of the dead letter.
        reason: reason of the dead letter.
        now_ms: epoch milliseconds of the failure.
        refused: claim of the version that the index has undone, if a refusal of the index is the reason.
    """
    # No other data of the event, because it may contain the value that the store rejects.
    before = current or _empty_manifest(plan.event.key, plan.position, plan.profile, now_ms=now_ms)
    failure = FailedVersion(
        version=plan.event.version,
        position=plan.position,
        kind=kind,
        reason=reason.encode("utf-8", "replace").decode(),
        removed=_distinct((*before.gone, *(refused.added if refused else ())), but=before.chunks),
    )
    failed = [*before.failed, failure][-MAX_FAILED_VERSIONS:]
    # Index changes of earlier failures are probably produced; their removals are kept only while they fit.
    room = MAX_GONE
    for at in range(len(failed) - 2, -1, -1):
        room -= len(failed[at].removed)
        if room < 0:
            failed[at] = failed[at].model_copy(update={"removed": ()})
    fence = refused.write_version if refused else before.write_version
    return before.model_copy(update={"failed": tuple(failed), "gone": (), "fence": fence})


def taken_over(claim: Manifest, writer: str) -> Manifest:
    """The claim with another writer and a higher fence: writes of the previous writer are rejected from now on."""
    return claim.model_copy(update={"fence": claim.write_version + 1, "writer": writer})


def rebuilt_manifest(passages: Sequence[StoredChunk], *, fence: int, now_ms: float) -> Manifest:
    """Rebuild a lost manifest from the passages of the document, of which there is at least one.

    Args:
        passages: all searchable passages.
        fence: highest version with which the index has stored one of them.
        now_ms: epoch milliseconds of the rebuild.
    """
    newest = max(passages, key=lambda one: one.version)
    return Manifest(
        tenant=newest.tenant,
        document_id=newest.document_id,
        version=newest.version,
        complete=True,
        state=LifeState.LIVE,
        position=newest.position,
        profile="",
        title=newest.title,
        source=newest.source,
        groups=newest.groups,
        metadata=newest.metadata,
        chunks=tuple(one.chunk_id for one in sorted(passages, key=lambda one: (one.start, one.chunk_id))),
        fence=fence,
        updated_ms=now_ms,
    )


def runs(events: Sequence[DocumentEvent]) -> list[tuple[DocumentKey, int]]:
    """Run of each event, in stream order. Within a run the newest version may supersede the others.

    A run consists of consecutive events of a document with the same right to change it. An event of another connector
    may be rejected, and then supersedes nothing; it may also change the owner of the document.
    """
    latest: dict[DocumentKey, tuple[tuple[str | None, bool], int]] = {}
    found = []
    for event in events:
        right = (event.connector, event.take_over)
        before, number = latest.get(event.key, (right, 0))
        latest[event.key] = (right, number + (right != before))
        found.append((event.key, latest[event.key][1]))
    return found


def supersede_within(versions: Sequence[tuple[object, int]]) -> list[int | None]:
    """Which events of a batch wait for another one.

    Args:
        versions: (run, version; see ``runs``) of each event in stream order.

    Returns:
        For each event, the version that supersedes it if it completes, or None. The newest version of a run is
        processed; of equal versions the first.
    """
    newest: dict[object, tuple[int, int]] = {}
    for number, (key, version) in enumerate(versions):
        if key not in newest or version > newest[key][0]:
            newest[key] = (version, number)
    return [None if newest[key][1] == number else newest[key][0] for number, (key, _) in enumerate(versions)]


def _nothing_to_write(plan: ChunkPlan, current: Manifest | None, *, lost: bool) -> NothingToWrite | None:
    """The reason why a version has nothing to write, or None; arguments as in ``decide``."""
    event = plan.event
    if current is not None:
        for failure in current.failed:
            if (failure.version, failure.position) == (event.version, plan.position):
                return AlreadyFailed(failure)
        if current.version > event.version:
            return Superseded(current)
        if current.version == event.version and not lost:
            if current.position == plan.position:
                return AlreadyDone(current)
            # Another event with the same version: the first one wins (I1), unless this one requests a rewrite.
            if not _rewrites(plan, current):
                return Superseded(current)
    owner = other_owner(current, event.connector, take_over=event.take_over)
    return OwnedByOther(owner) if owner is not None else None


def _rewrites(plan: ChunkPlan, current: Manifest) -> bool:
    """Whether the plan rewrites the current version. Of several such events the last one wins."""
    return plan.event.rewrite and Position.parse(plan.position) >= Position.parse(current.position)


def _claim(plan: ChunkPlan, current: Manifest | None, *, writer: str, now_ms: float) -> Manifest:
    event = plan.event
    deleted = event.change is Change.DELETED
    lowest = FENCES_PER_VERSION * event.version
    return Manifest(
        tenant=event.tenant,
        document_id=event.document_id,
        version=event.version,
        complete=False,
        state=LifeState.DELETED if deleted else LifeState.LIVE,
        position=plan.position,
        profile=plan.profile,
        title=plan.title,
        source=event.source,
        groups=event.groups,
        metadata=event.metadata,
        content_metadata=plan.content_metadata,
        content=event.content,
        content_type=event.content_type,
        connector=event.connector,
        previous=current,
        failed=current.failed if current else (),
        fence=max(lowest, current.write_version + 1) if current else lowest,
        writer=writer,
        updated_ms=now_ms,
    )


def _unreported_removals(current: Manifest | None, unreported: Collection[str]) -> tuple[str, ...]:
    """Ids of removed passages that no index change may have named yet."""
    if current is None:
        return ()
    chunk_ids = [*current.gone]
    if current.position in unreported:
        chunk_ids += current.removed
    for failure in current.failed:
        if failure.position in unreported:
            chunk_ids += failure.removed
    return _distinct(chunk_ids, but=current.chunks)


def _empty_manifest(key: DocumentKey, position: str, profile: str, *, now_ms: float) -> Manifest:
    """The manifest of a document without any completed version."""
    return Manifest(
        tenant=key.tenant,
        document_id=key.document_id,
        version=NEVER_COMPLETED,
        complete=True,
        state=LifeState.DELETED,
        position=position,
        profile=profile,
        fence=0,
        updated_ms=now_ms,
    )


def _distinct(chunk_ids: Sequence[str], *, but: Sequence[str]) -> tuple[str, ...]:
    """Distinct ids, without those in ``but``."""
    existing = frozenset(but)
    return tuple(chunk_id for chunk_id in dict.fromkeys(chunk_ids) if chunk_id not in existing)
