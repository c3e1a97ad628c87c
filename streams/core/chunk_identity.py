"""Stored passages and their ids. An id is a hash of all content that is stored under it.

There are two hashes. ``text_sha256`` is the hash of the embedded text, in which the context is truncated; it is the key
of the vector. ``content_sha256`` covers every stored field that the document determines; the id is derived from it. So
a passage is kept if and only if none of its content changed, and the ids that a change adds and removes cover every
change of stored content.
"""

import json
from base64 import b32encode
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b, sha256
from typing import Any, Final

from schemas.documents import DocumentKey
from schemas.events import ChunkPlan, PlannedChunk
from schemas.index import StoredChunk

PROVENANCE: Final = frozenset({"chunk_id", "version", "position", "start", "end"})
"""Fields that identify the write of a passage and its location in the text of that version. A kept passage retains
them, so an edit before it neither rewrites nor invalidates it."""

_PASSAGE_FIELDS: Final = {"text", "text_sha256", "heading_path"}
_DOCUMENT_FIELDS: Final = set(StoredChunk.model_fields) - PROVENANCE - _PASSAGE_FIELDS
"""All other fields, including future ones. They are equal for all passages of a document, so they are encoded once."""


def stored_chunks(plan: ChunkPlan, chunks: Sequence[PlannedChunk]) -> tuple[StoredChunk, ...]:
    """All passages of a document version in stored form.

    Args:
        plan: the version.
        chunks: chunks of the plan, in order, also if the plan contains only a reference to them.

    Returns:
        One passage for each chunk, in order, with distinct ids.
    """
    event = plan.event
    groups = tuple(sorted(set(event.groups)))
    chunks_without_id = [
        StoredChunk(
            chunk_id="",
            tenant=event.tenant,
            document_id=event.document_id,
            version=event.version,
            position=plan.position,
            title=plan.title,
            source=event.source,
            groups=groups,
            metadata=plan.content_metadata | event.metadata,
            **dict(chunk),
        )
        for chunk in chunks
    ]
    return with_ids(chunks_without_id, plan.profile)


def with_ids(chunks: Sequence[StoredChunk], profile: str) -> tuple[StoredChunk, ...]:
    """Assign ids to all passages of one document version, in order.

    Args:
        chunks: the passages; their ids are ignored.
        profile: versions of parser, splitter and model, which determine text and vector.
    """
    attributes = attributes_sha256(chunks[0]) if chunks else ""
    occurrences: Counter[str] = Counter()
    with_id = []
    for chunk in chunks:
        content = content_sha256(chunk, attributes)
        named_id = chunk_id(chunk.key, profile, content, occurrences[content])
        with_id.append(chunk.model_copy(update={"chunk_id": named_id}))
        occurrences[content] += 1
    return tuple(with_id)


def attributes_sha256(chunk: StoredChunk) -> str:
    """Hash of the attributes that are equal for all passages of a document version."""
    return sha256(_encode(chunk.model_dump(mode="json", include=_DOCUMENT_FIELDS))).hexdigest()


def content_sha256(chunk: StoredChunk, attributes: str) -> str:
    """Hash of all stored content of a passage, independent of the version that wrote it.

    Args:
        chunk: the passage.
        attributes: its ``attributes_sha256``.
    """
    return sha256(_encode([attributes, chunk.model_dump(mode="json", include=_PASSAGE_FIELDS)])).hexdigest()


def chunk_id(key: DocumentKey, profile: str, content: str, occurrence: int) -> str:
    """Id of a passage: 26 characters of ``a-z2-7``.

    Args:
        key: key of the document.
        profile: as in ``with_ids``.
        content: its ``content_sha256``.
        occurrence: number of preceding passages of the document with the same content.
    """
    encoded = _encode([*key, profile, content, occurrence])
    return b32encode(blake2b(encoded, digest_size=16).digest()).decode().rstrip("=").lower()


def _encode(value: Any) -> bytes:
    """Canonical JSON: joined strings are ambiguous, and ``1 == True == 1.0`` although their JSON differs."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
