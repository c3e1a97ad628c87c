"""What agreement of stream, index and contents means. Pure: values in, findings out."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final

from schemas.documents import DocumentKey, LifeState, Outcome
from schemas.events import Change, DocumentEvent
from schemas.index import Manifest, StoredChunk
from schemas.positions import Position


class Kind(StrEnum):
    """Kinds of disagreement; the first ones name documents, the last ones passages."""

    NOT_INDEXED = "not indexed"
    OUTDATED = "older than the stream"
    UNFINISHED = "unfinished change"
    UNKNOWN = "unknown to the stream"
    AHEAD = "version that the stream does not have"
    NOT_DELETED = "not deleted"
    WRONGLY_DELETED = "wrongly deleted"
    OTHER_CONTENT = "other content or attributes than the stream's"
    CONTENT_LOST = "content lost"
    MISSING_PASSAGES = "missing passages"
    ORPHAN = "orphaned passage"
    FOREIGN = "passage of another document"
    OTHER_GROUPS = "passage with other groups than its document"


_SEND_AGAIN: Final = "--repair sends the event again"
_UPLOAD_AGAIN: Final = "delete the document and upload it again: an update would keep the passages that it believes in"
_LOOK: Final = "something else wrote to this index: find out what before anything is changed"

ADVICE: Final = {
    Kind.NOT_INDEXED: _SEND_AGAIN,
    Kind.OUTDATED: _SEND_AGAIN,
    Kind.UNFINISHED: _SEND_AGAIN,
    Kind.UNKNOWN: _LOOK,
    Kind.AHEAD: _LOOK,
    Kind.NOT_DELETED: _UPLOAD_AGAIN,
    Kind.WRONGLY_DELETED: _UPLOAD_AGAIN,
    Kind.OTHER_CONTENT: _UPLOAD_AGAIN,
    Kind.CONTENT_LOST: "restore the blob store from its backup, or upload the document again",
    Kind.MISSING_PASSAGES: _UPLOAD_AGAIN,
    Kind.ORPHAN: "--repair removes it",
    Kind.FOREIGN: _LOOK,
    Kind.OTHER_GROUPS: _UPLOAD_AGAIN,
}
"""What to do about each kind."""

SENT_AGAIN: Final = frozenset({Kind.NOT_INDEXED, Kind.OUTDATED, Kind.UNFINISHED})
"""What processing the event once more mends: the index does not have its version as complete."""

Findings = Mapping[Kind, list[str]]
"""Kind → documents (``tenant/id``) or passages (``tenant/id CHUNK``) that it was found in."""


def expected(
    events: Mapping[Position, DocumentEvent], outcomes: Mapping[Position, Outcome]
) -> dict[DocumentKey, DocumentEvent | None]:
    """The event that each document should stand at; None where all of a document's events were refused.

    The newest version wins, and of equal ones the first. A refused version leaves what was there (I3), also in place of
    an older one that gave way to it while both were under way.

    Args:
        events: the whole document stream.
        outcomes: how events ended, where that is known.
    """
    histories: dict[DocumentKey, list[tuple[DocumentEvent, Outcome | None]]] = defaultdict(list)
    for position, event in sorted(events.items()):
        histories[event.key].append((event, outcomes.get(position)))
    standing: dict[DocumentKey, DocumentEvent | None] = {}
    for key, history in histories.items():
        refused = max((event.version for event, outcome in history if outcome is Outcome.DEAD_LETTER), default=-1)
        kept = [event for event, outcome in history if not _gave_way(event, outcome, refused)]
        standing[key] = max(kept, key=lambda event: event.version, default=None)
    return standing


def refused(events: Mapping[Position, DocumentEvent], outcomes: Mapping[Position, Outcome]) -> list[str]:
    """Documents whose newest version was refused."""
    newest: dict[DocumentKey, tuple[int, bool]] = {}
    for position, event in sorted(events.items()):
        if event.version > newest.get(event.key, (-1, False))[0]:
            newest[event.key] = (event.version, outcomes.get(position) is Outcome.DEAD_LETTER)
    return sorted(str(key) for key, (_, is_refused) in newest.items() if is_refused)


def compare(
    wanted: Mapping[DocumentKey, DocumentEvent | None],
    manifests: Mapping[DocumentKey, Manifest],
    chunks: Iterable[StoredChunk],
) -> dict[Kind, list[str]]:
    """Every disagreement, by kind; kinds without any are absent."""
    findings: dict[Kind, list[str]] = defaultdict(list)
    for key in sorted(wanted.keys() | manifests.keys()):
        if key not in wanted:
            findings[Kind.UNKNOWN].append(str(key))
        elif (kind := _disagreement(wanted[key], manifests.get(key))) is not None:
            findings[kind].append(str(key))
    owners = {chunk_id: key for key, manifest in manifests.items() for chunk_id in manifest.chunks}
    seen = set()
    for chunk in chunks:
        owner = owners.get(chunk.chunk_id)
        seen.add(chunk.chunk_id)
        passage = f"{chunk.key} {chunk.chunk_id}"
        if owner is None:
            findings[Kind.ORPHAN].append(passage)
        elif owner != chunk.key:
            findings[Kind.FOREIGN].append(passage)
        elif frozenset(chunk.groups) != frozenset(manifests[owner].groups):
            findings[Kind.OTHER_GROUPS].append(passage)
    if missing := sorted({str(owners[chunk_id]) for chunk_id in owners.keys() - seen}):
        findings[Kind.MISSING_PASSAGES] = missing
    return dict(findings)


def _gave_way(event: DocumentEvent, outcome: Outcome | None, refused: int) -> bool:
    return outcome is Outcome.DEAD_LETTER or (outcome is Outcome.SUPERSEDED and event.version <= refused)


def _disagreement(event: DocumentEvent | None, manifest: Manifest | None) -> Kind | None:
    """How a document's manifest differs from what its events say."""
    if manifest is None:
        return None if event is None else Kind.NOT_INDEXED
    if event is None:  # a refused first version may leave a manifest that says so, and nothing else
        return Kind.AHEAD if manifest.state is LifeState.LIVE else None
    if manifest.version < event.version:
        return Kind.OUTDATED
    if not manifest.complete:
        return Kind.UNFINISHED
    # A version that the index refused is spent: the manifest then has its number, and the content from before it.
    if manifest.version > event.version and manifest.failure is None:
        return Kind.AHEAD
    return _other_state(event, manifest)


def _other_state(event: DocumentEvent, manifest: Manifest) -> Kind | None:
    """How the same version differs."""
    deleted = event.change is Change.DELETED
    if (manifest.state is LifeState.DELETED) != deleted:
        return Kind.NOT_DELETED if deleted else Kind.WRONGLY_DELETED
    return None if deleted or _content(event) == _content(manifest) else Kind.OTHER_CONTENT


def _content(one: DocumentEvent | Manifest) -> tuple[object, ...]:
    return one.content, one.source, frozenset(one.groups), tuple(sorted(one.metadata.items()))
