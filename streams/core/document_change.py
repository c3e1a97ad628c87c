"""What one document version changes in the index, given the manifest that stands there.

This is where I1 (newer wins), I2 (no resurrection) and I6 (replay is harmless) are decided. Only what has completed
decides: a claim is settled before (``streams.recovery``), and a version that was given up changes nothing.
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
    """The version is the newest: make it searchable.

    Attributes:
        claim: manifest to write before any passage.
        add: numbers of the planned chunks to write, in order. Nothing stands under their ids.
        remove: ids of passages to take away.
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
    """This version is searchable; only the news of it may still be missing."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class OwnedByOther:
    """The event is of a connector, and another one owns the live document: it changes nothing."""

    owner: str


@dataclass(frozen=True, slots=True)
class AlreadyFailed:
    """This event was given up; only the news of it may still be missing."""

    failure: FailedVersion


Settled = Superseded | AlreadyDone | AlreadyFailed | OwnedByOther
"""Why a version has nothing to write."""


def decide(
    plan: ChunkPlan,
    chunk_ids: Sequence[str],
    standing: Manifest | None,
    *,
    now_ms: float,
    writer: str = "",
    lost: bool = False,
    unreported: Collection[str] = (),
) -> Write | Settled:
    """Compare a plan with what is searchable.

    Args:
        plan: the document version, parsed and split.
        chunk_ids: id of each planned chunk, which stands for all its stored content; empty for a delete.
        standing: the current manifest in real time, complete; or None.
        now_ms: epoch milliseconds, for the record.
        writer: names the worker that will write.
        lost: the manifest itself is gone, and ``standing`` was made from the passages that are there: they may be of a
            change that was not finished.
        unreported: positions of events whose index change may not be produced yet. If this version replaces one of
            them, its own index change also names the passages that the replaced one removed.
    """
    settled = _settled(plan, standing, lost=lost)
    if settled is not None:
        return settled
    claim = _claim(plan, standing, writer=writer, now_ms=now_ms)
    claim = claim.model_copy(update={"gone": _unreported_removals(standing, unreported)})
    anew = plan.event.rewrite or lost
    there = {original_id(chunk_id): chunk_id for chunk_id in (standing.chunks if standing else ())}
    # What is there is not trusted, and is not written over. Nor is it enough that nothing is there: under an id that
    # was used before, the index may remember a later removal, and refuse to take the passage again.
    writing = f"{plan.position} {claim.write_version}"
    names: list[str] = []
    add: list[int] = []
    for number, chunk_id in enumerate(chunk_ids):
        if not anew and chunk_id in there:
            names.append(there[chunk_id])
        else:
            names.append(copy_id(chunk_id, writing) if anew else chunk_id)
            add.append(number)
    wanted = frozenset(names)
    # In the manifest's order, so that equal inputs give equal plans.
    remove = tuple(chunk_id for chunk_id in (standing.chunks if standing else ()) if chunk_id not in wanted)
    added = tuple(names[number] for number in add)
    changed = {"chunks": tuple(names), "added": added, "removed": remove}
    return Write(claim.model_copy(update=changed), tuple(add), remove)


def completed(claim: Manifest, *, now_ms: float) -> Manifest:
    """The manifest once the claim's passages are searchable."""
    return claim.model_copy(
        update={
            "complete": True,
            "removed": _joined((*claim.removed, *claim.gone), but=claim.chunks),
            "gone": (),
            "previous": None,
            "writer": None,
            "failed": tuple(one for one in claim.failed if one.version > claim.version),
            "updated_ms": now_ms,
        }
    )


def rolled_forward(claim: Manifest, *, now_ms: float) -> Manifest:
    """The manifest once somebody else has found the claim's passages searchable, and all others are taken away."""
    manifest = completed(claim, now_ms=now_ms)
    # Its event may be told as superseded, by whatever comes next: that has to tell of these too.
    return manifest.model_copy(update={"gone": manifest.removed})


def rolled_back(claim: Manifest, *, now_ms: float) -> Manifest:
    """The manifest once nothing of the claim is left: what the claim was to replace, under the claim's fence."""
    before = claim.previous or _nothing(claim.key, claim.position, claim.profile, now_ms=now_ms)
    gone = _joined((*claim.gone, *claim.added), but=before.chunks)
    return before.model_copy(update={"failed": claim.failed, "gone": gone, "fence": claim.write_version})


def closed(
    standing: Manifest | None,
    plan: ChunkPlan,
    kind: str,
    reason: str,
    *,
    now_ms: float,
    refused: Manifest | None = None,
) -> Manifest:
    """The manifest after a version was given up: what is searchable stays as it is (I3), and nothing is superseded.

    Args:
        standing: what is searchable, complete; or None.
        plan: of the version.
        kind: of the dead letter.
        reason: for people.
        now_ms: epoch milliseconds, for the record.
        refused: the version's claim, of which the index has undone everything, if that is why.
    """
    # Nothing else of the event: what is in it may be what no store takes.
    before = standing or _nothing(plan.event.key, plan.position, plan.profile, now_ms=now_ms)
    failure = FailedVersion(
        version=plan.event.version,
        position=plan.position,
        kind=kind,
        reason=reason.encode("utf-8", "replace").decode(),
        removed=_joined((*before.gone, *(refused.added if refused else ())), but=before.chunks),
    )
    failed = [*before.failed, failure][-MAX_FAILED_VERSIONS:]
    # The news of earlier ones is most likely told; it is kept while that takes little room.
    room = MAX_GONE
    for at in range(len(failed) - 2, -1, -1):
        room -= len(failed[at].removed)
        if room < 0:
            failed[at] = failed[at].model_copy(update={"removed": ()})
    fence = refused.write_version if refused else before.write_version
    return before.model_copy(update={"failed": tuple(failed), "gone": (), "fence": fence})


def taken_over(claim: Manifest, writer: str) -> Manifest:
    """The claim as another writer takes it over, to settle it: writes of the one before it are refused from now on."""
    return claim.model_copy(update={"fence": claim.write_version + 1, "writer": writer})


def found_again(passages: Sequence[StoredChunk], *, fence: int, now_ms: float) -> Manifest:
    """A manifest in place of one that was lost, from the document's passages; of those there must be one at least.

    Args:
        passages: all that are searchable.
        fence: highest version that the index has of one of them.
        now_ms: epoch milliseconds, for the record.
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
    """For each of several events in stream order, the run of events that one of them may supersede unseen.

    Events of a document are a run for as long as they have the same right to change it. Those of another connector may
    be refused, and what is refused supersedes nothing; they may also change who owns it.
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
    """Of several events on their way together, which wait for another one.

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


def _settled(plan: ChunkPlan, standing: Manifest | None, *, lost: bool) -> Settled | None:
    """Why the version has nothing to write, if it has not; the arguments are those of ``decide``."""
    event = plan.event
    if standing is not None:
        for failure in standing.failed:
            if (failure.version, failure.position) == (event.version, plan.position):
                return AlreadyFailed(failure)
        if standing.version > event.version:
            return Superseded(standing)
        if standing.version == event.version and not lost:
            if standing.position == plan.position:
                return AlreadyDone(standing)
            # Another event that was given the same version: the first stays (I1), unless this one writes it anew.
            if not _rewrites(plan, standing):
                return Superseded(standing)
    owner = other_owner(standing, event.connector, take_over=event.take_over)
    return OwnedByOther(owner) if owner is not None else None


def _rewrites(plan: ChunkPlan, standing: Manifest) -> bool:
    """Whether the plan is to write a version anew that stands already; of several such events the last one does."""
    return plan.event.rewrite and Position.parse(plan.position) >= Position.parse(standing.position)


def _claim(plan: ChunkPlan, standing: Manifest | None, *, writer: str, now_ms: float) -> Manifest:
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
        previous=standing,
        failed=standing.failed if standing else (),
        fence=max(lowest, standing.write_version + 1) if standing else lowest,
        writer=writer,
        updated_ms=now_ms,
    )


def _unreported_removals(standing: Manifest | None, unreported: Collection[str]) -> tuple[str, ...]:
    """Ids of removed passages that no index change may have named yet."""
    if standing is None:
        return ()
    chunk_ids = [*standing.gone]
    if standing.position in unreported:
        chunk_ids += standing.removed
    for failure in standing.failed:
        if failure.position in unreported:
            chunk_ids += failure.removed
    return _joined(chunk_ids, but=standing.chunks)


def _nothing(key: DocumentKey, position: str, profile: str, *, now_ms: float) -> Manifest:
    """The manifest of a document of which no version has completed."""
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


def _joined(chunk_ids: Sequence[str], *, but: Sequence[str]) -> tuple[str, ...]:
    """Each id once, without those of passages that are there."""
    there = frozenset(but)
    return tuple(chunk_id for chunk_id in dict.fromkeys(chunk_ids) if chunk_id not in there)
