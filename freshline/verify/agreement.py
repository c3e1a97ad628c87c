"""Consistency rules of stream, index and contents. Pure functions."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Final, NamedTuple, Self

from schemas.documents import DocumentKey, LifeState, Outcome
from schemas.events import Change, ChunkPlan, DocumentEvent
from schemas.index import Manifest, StoredChunk
from schemas.positions import Position
from streams.core.chunk_identity import attributes_sha256, content_sha256


class Kind(StrEnum):
    """Kinds of inconsistency. The last ones refer to passages, the others to documents."""

    NOT_INDEXED = "not_indexed"
    OUTDATED = "outdated"
    UNFINISHED = "unfinished_change"
    UNKNOWN = "unknown_document"
    AHEAD = "unknown_version"
    NOT_DELETED = "not_deleted"
    WRONGLY_DELETED = "wrongly_deleted"
    OTHER_CONTENT = "document_differs"
    CONTENT_LOST = "content_lost"
    MISSING_PASSAGES = "missing_passages"
    ORPHAN = "orphaned_passage"
    FOREIGN = "passage_of_other_document"
    OTHER_GROUPS = "passage_groups_differ"
    NEWER = "newer_passage"
    OTHER_PASSAGE = "passage_differs"


_REWRITE: Final = "--repair rewrites the document"
_INVESTIGATE: Final = "another writer changed this index: investigate before any repair"

ADVICE: Final = {
    Kind.NOT_INDEXED: _REWRITE,
    Kind.OUTDATED: _REWRITE,
    Kind.UNFINISHED: _REWRITE,
    Kind.UNKNOWN: _INVESTIGATE,
    Kind.AHEAD: _INVESTIGATE,
    Kind.NOT_DELETED: _REWRITE,
    Kind.WRONGLY_DELETED: _REWRITE,
    Kind.OTHER_CONTENT: _REWRITE,
    Kind.CONTENT_LOST: "restore the blob store from its backup, or upload the document again; its passages are kept",
    Kind.MISSING_PASSAGES: _REWRITE,
    Kind.ORPHAN: "--repair removes it",
    Kind.FOREIGN: _INVESTIGATE,
    Kind.OTHER_GROUPS: _REWRITE,
    Kind.NEWER: _REWRITE,
    Kind.OTHER_PASSAGE: _REWRITE,
}
"""Recommended action for each kind."""

_OF_DOCUMENTS: Final = frozenset(kind for kind, advice in ADVICE.items() if advice == _REWRITE)
_NAMING_PASSAGES: Final = frozenset({Kind.ORPHAN, Kind.FOREIGN, Kind.OTHER_GROUPS, Kind.NEWER, Kind.OTHER_PASSAGE})

Findings = Mapping[Kind, Sequence[str]]
"""Kind → affected documents (``tenant/id``) or passages (``tenant/id CHUNK``)."""


def expected(
    events: Mapping[Position, DocumentEvent], outcomes: Mapping[Position, Outcome]
) -> dict[DocumentKey, DocumentEvent | None]:
    """Expected event of each document; None if all its events were rejected.

    The newest version wins, and of equal versions the first. A rejected version leaves the document unchanged (I3),
    also instead of an older version that it superseded while both were in progress.

    Args:
        events: the whole document stream.
        outcomes: known outcomes of the events.
    """
    histories: dict[DocumentKey, list[tuple[DocumentEvent, Outcome | None]]] = defaultdict(list)
    for position, event in sorted(events.items()):
        histories[event.key].append((event, outcomes.get(position)))
    states: dict[DocumentKey, DocumentEvent | None] = {}
    for key, history in histories.items():
        # A rejected rewrite leaves its version unchanged.
        dead = (event for event, outcome in history if outcome is Outcome.DEAD_LETTER and not event.rewrite)
        rejected = max((event.version for event in dead), default=-1)
        kept = [event for event, outcome in history if not _is_superseded(event, outcome, rejected)]
        states[key] = max(kept, key=lambda event: event.version, default=None)
    return states


def rejected(events: Mapping[Position, DocumentEvent], outcomes: Mapping[Position, Outcome]) -> list[str]:
    """Documents whose newest version was rejected in every attempt."""
    newest: dict[DocumentKey, int] = {}
    for event in events.values():
        newest[event.key] = max(event.version, newest.get(event.key, -1))
    ends: dict[DocumentKey, set[Outcome | None]] = defaultdict(set)
    for position, event in events.items():
        if event.version == newest[event.key]:
            ends[event.key].add(outcomes.get(position))
    return sorted(str(key) for key, end in ends.items() if Outcome.DEAD_LETTER in end and Outcome.DONE not in end)


def to_rewrite(
    findings: Findings, wanted: Mapping[DocumentKey, DocumentEvent | None]
) -> dict[DocumentKey, DocumentEvent]:
    """Events to republish, by document, without documents whose content is lost."""
    lost = set(findings.get(Kind.CONTENT_LOST, ()))
    names = named_documents({kind: findings.get(kind, ()) for kind in _OF_DOCUMENTS})
    keys = [DocumentKey.parse(name) for name in sorted(names - lost)]
    return {key: event for key in keys if (event := wanted.get(key)) is not None}


def named_documents(findings: Findings) -> set[str]:
    """Documents (``tenant/id``) with findings."""
    return {
        name.rpartition(" ")[0] if kind in _NAMING_PASSAGES else name
        for kind, names in findings.items()
        for name in names
    }


def compare(
    wanted: Mapping[DocumentKey, DocumentEvent | None],
    manifests: Mapping[DocumentKey, Manifest],
    chunks: Iterable[StoredChunk],
) -> dict[Kind, list[str]]:
    """All inconsistencies by kind."""
    findings: dict[Kind, list[str]] = defaultdict(list)
    for key in sorted(wanted.keys() | manifests.keys()):
        if key not in wanted:
            findings[Kind.UNKNOWN].append(str(key))
        elif (kind := _disagreement(wanted[key], manifests.get(key))) is not None:
            findings[kind].append(str(key))
    owners = {
        chunk_id: one for manifest in manifests.values() for one in _versions(manifest) for chunk_id in one.chunks
    }
    seen = set()
    for chunk in chunks:
        owner = owners.get(chunk.chunk_id)
        seen.add(chunk.chunk_id)
        passage = f"{chunk.key} {chunk.chunk_id}"
        if owner is None:
            findings[Kind.ORPHAN].append(passage)
        elif owner.key != chunk.key:
            findings[Kind.FOREIGN].append(passage)
        elif frozenset(chunk.groups) != frozenset(owner.groups):
            findings[Kind.OTHER_GROUPS].append(passage)
        elif chunk.version > owner.version:
            findings[Kind.NEWER].append(passage)
    whole = (manifest for manifest in manifests.values() if seen.issuperset(manifest.chunks) or not manifest.complete)
    if missing := sorted(str(key) for key in manifests.keys() - {manifest.key for manifest in whole}):
        findings[Kind.MISSING_PASSAGES] = missing
    return dict(findings)


class PassageContent(NamedTuple):
    """Compared properties of a passage.

    Attributes:
        sha256: hash of all stored content; empty if its searched fields differ from it.
        version: version that wrote it.
        span: range in the parsed text of that version.
    """

    sha256: str
    version: int
    span: tuple[int, int]

    @classmethod
    def of(cls, chunk: StoredChunk, *, consistent: bool = True) -> Self:
        """Properties of a passage, which must have its text."""
        content = content_sha256(chunk, attributes_sha256(chunk)) if consistent else ""
        return cls(content, chunk.version, (chunk.start, chunk.end))


def compare_passages(
    manifest: Manifest, plan: ChunkPlan, wanted: Sequence[StoredChunk], stored: Mapping[str, PassageContent]
) -> dict[Kind, list[str]]:
    """Compare a document's stored passages with those of its content. Missing passages are ignored.

    Args:
        manifest: complete manifest of the same profile as ``wanted``.
        plan: plan of the content.
        wanted: expected passages, in order.
        stored: stored passages by chunk id.
    """
    wanted_attributes = (plan.title, _encoded(plan.content_metadata))
    if (manifest.title, _encoded(manifest.content_metadata)) != wanted_attributes or len(manifest.chunks) != len(
        wanted
    ):
        return {Kind.OTHER_CONTENT: [str(manifest.key)]}
    differing = [
        f"{manifest.key} {chunk_id}"
        for chunk_id, passage in zip(manifest.chunks, map(PassageContent.of, wanted), strict=True)
        if chunk_id in stored and not _same(passage, stored[chunk_id])
    ]
    return {Kind.OTHER_PASSAGE: differing} if differing else {}


def _same(wanted: PassageContent, stored: PassageContent) -> bool:
    """Whether passages are equal. Spans are comparable only within a version."""
    return wanted.sha256 == stored.sha256 and (wanted.version != stored.version or wanted.span == stored.span)


def _versions(manifest: Manifest) -> tuple[Manifest, ...]:
    """Versions whose passages may exist. A remaining claim does not record which of its own are written."""
    return (manifest.previous, manifest) if manifest.previous is not None else (manifest,)


def _is_superseded(event: DocumentEvent, outcome: Outcome | None, rejected: int) -> bool:
    return outcome is Outcome.DEAD_LETTER or (outcome is Outcome.SUPERSEDED and event.version <= rejected)


def _disagreement(event: DocumentEvent | None, manifest: Manifest | None) -> Kind | None:
    """Difference between a document's manifest and its events."""
    if manifest is None:
        return None if event is None else Kind.NOT_INDEXED
    if event is None:  # a rejected first version may leave a manifest that records only the failure
        return Kind.AHEAD if manifest.state is LifeState.LIVE else None
    if manifest.version < event.version:
        return Kind.OUTDATED
    if not manifest.complete:
        return Kind.UNFINISHED
    if manifest.version > event.version:
        return Kind.AHEAD
    return _other_state(event, manifest)


def _other_state(event: DocumentEvent, manifest: Manifest) -> Kind | None:
    """Difference within the same version."""
    deleted = event.change is Change.DELETED
    if (manifest.state is LifeState.DELETED) != deleted:
        return Kind.NOT_DELETED if deleted else Kind.WRONGLY_DELETED
    return None if deleted or _content(event) == _content(manifest) else Kind.OTHER_CONTENT


def _content(one: DocumentEvent | Manifest) -> tuple[object, ...]:
    return one.content, one.content_type, one.source, frozenset(one.groups), _encoded(one.metadata)


def _encoded(metadata: Mapping[str, object]) -> str:
    """As JSON, in which 1, 1.0 and true differ."""
    return json.dumps(metadata, sort_keys=True)
