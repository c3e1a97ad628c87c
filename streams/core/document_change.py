"""What one document version changes in the index, given the manifest that stands there.

This is where I1 (newer wins), I2 (no resurrection) and I6 (replay is harmless) are decided.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from schemas.documents import DocumentKey, LifeState
from schemas.events import Change, ChunkPlan, DocumentEvent
from schemas.index import MAX_REWRITES, Manifest
from schemas.ownership import other_owner
from schemas.positions import Position


@dataclass(frozen=True, slots=True)
class Write:
    """The version is the newest: make it searchable.

    Attributes:
        claim: manifest to write before any passage.
        add: numbers of the planned chunks to write, in order.
        remove: ids of passages to take away.
    """

    claim: Manifest
    add: tuple[int, ...]
    remove: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Superseded:
    """A newer version stands; nothing is to be done."""

    by_version: int


@dataclass(frozen=True, slots=True)
class AlreadyDone:
    """This version is searchable; only the news of it may still be missing."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class OwnedByOther:
    """The event is of a connector, and another one owns the live document: it changes nothing."""

    owner: str


def decide(
    plan: ChunkPlan,
    chunk_ids: Sequence[str],
    standing: Manifest | None,
    *,
    now_ms: float,
    strays: Sequence[str] = (),
) -> Write | Superseded | AlreadyDone | OwnedByOther:
    """Compare a plan with the standing manifest.

    Args:
        plan: the document version, parsed and split.
        chunk_ids: id of each planned chunk, which stands for all its stored content; empty for a delete.
        standing: the current manifest in real time, or None.
        now_ms: epoch milliseconds, for the record.
        strays: ids of passages that are there although nothing stands.
    """
    event = plan.event
    if standing is not None:
        if standing.version > event.version:
            return Superseded(standing.version)
        if standing.version == event.version and standing.complete and standing.position == plan.position:
            return AlreadyDone(standing)
        # Another event that was given the same version: the first stays (I1), unless this one is to write it anew. A
        # rewrite stands as soon as it is claimed, since what was there before it is not trusted.
        stands = standing.complete or standing.rewrites
        if standing.version == event.version and stands and not _rewrites(plan, standing):
            return Superseded(standing.version)
    owner = other_owner(standing, event.connector, take_over=event.take_over)
    if owner is not None:
        return OwnedByOther(owner)
    surely_there, maybe_there = _present(standing, strays)
    claim = _claim(plan, chunk_ids, standing, now_ms=now_ms)
    keep = frozenset[str]() if event.rewrite else surely_there
    add = tuple(number for number, chunk_id in enumerate(chunk_ids) if chunk_id not in keep)
    # In the manifest's order, so that equal inputs give equal plans.
    wanted = frozenset(chunk_ids)
    remove = tuple(chunk_id for chunk_id in maybe_there if chunk_id not in wanted)
    added = tuple(chunk_ids[number] for number in add)
    changed = {"added": added, "removed": remove, "before": _before(standing)}
    return Write(claim.model_copy(update=changed), add, remove)


def completed(claim: Manifest, *, now_ms: float) -> Manifest:
    """The manifest once its passages are searchable."""
    return claim.model_copy(update={"complete": True, "before": (), "updated_ms": now_ms})


def refused(claim: Manifest, standing: Manifest | None, reason: str, *, now_ms: float) -> Manifest:
    """The manifest after the index refused the new content: the version is spent, the old content stays (I3)."""
    spent = {"complete": True, "before": (), "failure": reason, "updated_ms": now_ms}
    if standing is None:
        return claim.model_copy(update=spent | {"state": LifeState.DELETED, "chunks": (), "content": None})
    # Where it was certain what stood, the index has undone the refused change. Else what that touched stays
    # uncertain, and the next version writes or removes it in any case.
    surely_there, maybe_there = _present(standing)
    certain = surely_there.issuperset(maybe_there)
    touched = {"added": (), "removed": ()} if certain else {"added": claim.added, "removed": claim.removed}
    taken = {"version": claim.version, "rewrites": claim.rewrites, "position": claim.position}
    return standing.model_copy(update=spent | touched | taken)


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
    """Of several events on their way together, which need not be processed at all.

    Args:
        versions: (run, version; see ``runs``) of each event in stream order.

    Returns:
        For each event, the version that supersedes it, or None. The newest version of a run is processed; of equal
        versions the first.
    """
    newest: dict[object, tuple[int, int]] = {}
    for number, (key, version) in enumerate(versions):
        if key not in newest or version > newest[key][0]:
            newest[key] = (version, number)
    return [None if newest[key][1] == number else newest[key][0] for number, (key, _) in enumerate(versions)]


def _present(standing: Manifest | None, strays: Sequence[str] = ()) -> tuple[frozenset[str], tuple[str, ...]]:
    """Which passages are surely searchable, and which may be, in a stable order."""
    if standing is None:
        return frozenset(), tuple(strays)
    if standing.complete and standing.failure is None:
        return frozenset(standing.chunks), standing.chunks
    # Its writer was stopped somewhere, or refused: what it added may be missing, what it removed may still be there.
    touched = (*standing.added, *standing.removed)
    return frozenset(standing.chunks).difference(touched), tuple(dict.fromkeys((*standing.chunks, *touched)))


def _before(standing: Manifest | None) -> tuple[tuple[str, ...], ...]:
    """The versions of which one is searchable now, as ids of their passages."""
    if standing is None:
        return ()
    if standing.complete:
        return (standing.chunks,)
    return tuple(dict.fromkeys((*standing.before, standing.chunks)))


def _rewrites(plan: ChunkPlan, standing: Manifest) -> bool:
    """Whether the plan is to write a version anew that stands already; of several such events the last one does."""
    return plan.event.rewrite and Position.parse(plan.position) >= Position.parse(standing.position)


def _number_of_rewrite(plan: ChunkPlan, standing: Manifest | None) -> int:
    """Which writing of its version this is.

    Each has a number of its own, so that a late writer of an earlier one is refused; one that was stopped and comes
    again keeps its number.
    """
    if standing is None or standing.version != plan.event.version:
        return 0
    begun = not standing.complete and standing.position == plan.position
    return min(MAX_REWRITES, standing.rewrites + int(plan.event.rewrite and not begun))


def _claim(plan: ChunkPlan, chunk_ids: Sequence[str], standing: Manifest | None, *, now_ms: float) -> Manifest:
    event = plan.event
    deleted = event.change is Change.DELETED
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
        chunks=tuple(chunk_ids),
        rewrites=_number_of_rewrite(plan, standing),
        updated_ms=now_ms,
    )
