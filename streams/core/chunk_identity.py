"""Stored passages and their ids. An id is a hash of all the content that is stored under it.

Two hashes, two purposes. ``text_sha256`` is the hash of the embedded text, which is cut and abbreviated; it is the key
of the vector. ``content_sha256`` covers every stored field that the document determines. It makes the id, so a passage
is kept exactly if nothing of it changed, and the ids that a change adds and removes cover every change of what is
stored.
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
"""Fields of a stored passage that tell which write made it, and where it was in the text of that version. A passage
that is kept keeps them, so an edit above it neither rewrites nor invalidates it."""

_OWN: Final = {"text", "text_sha256", "heading_path"}
_ATTRIBUTES: Final = set(StoredChunk.model_fields) - PROVENANCE - _OWN
"""Every other field, future ones included; the same for all passages of a document, so it is encoded once."""


def stored_chunks(plan: ChunkPlan, chunks: Sequence[PlannedChunk]) -> tuple[StoredChunk, ...]:
    """All passages of a document version as they are stored if this version writes them.

    Args:
        plan: the version.
        chunks: of the plan, in order, also if the plan only refers to them.

    Returns:
        One for each chunk, in order, with distinct ids.
    """
    event = plan.event
    groups = tuple(sorted(set(event.groups)))
    bare = [
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
    return with_ids(bare, plan.profile)


def with_ids(chunks: Sequence[StoredChunk], profile: str) -> tuple[StoredChunk, ...]:
    """All passages of one document version, in order, with their ids.

    Args:
        chunks: the passages; the ids they have are ignored.
        profile: parser, splitter and model; they determine text and vector.
    """
    attributes = attributes_sha256(chunks[0]) if chunks else ""
    seen: Counter[str] = Counter()
    named = []
    for chunk in chunks:
        content = content_sha256(chunk, attributes)
        name = chunk_id(chunk.key, profile, content, seen[content])
        named.append(chunk.model_copy(update={"chunk_id": name}))
        seen[content] += 1
    return tuple(named)


def attributes_sha256(chunk: StoredChunk) -> str:
    """Hash of the attributes that all passages of a document version share."""
    return sha256(_encoded(chunk.model_dump(mode="json", include=_ATTRIBUTES))).hexdigest()


def content_sha256(chunk: StoredChunk, attributes: str) -> str:
    """Hash of all stored content of a passage, whichever version wrote it.

    Args:
        chunk: the passage.
        attributes: its ``attributes_sha256``.
    """
    return sha256(_encoded([attributes, chunk.model_dump(mode="json", include=_OWN)])).hexdigest()


def chunk_id(key: DocumentKey, profile: str, content: str, occurrence: int) -> str:
    """Id of one passage: 26 characters of ``a-z2-7``.

    Args:
        key: the document it belongs to.
        profile: see ``with_ids``.
        content: its ``content_sha256``.
        occurrence: how many passages of the document before it have the same content.
    """
    named = _encoded([*key, profile, content, occurrence])
    return b32encode(blake2b(named, digest_size=16).digest()).decode().rstrip("=").lower()


def _encoded(value: Any) -> bytes:
    """JSON, since joined strings are ambiguous, and since ``1 == True == 1.0`` but their JSON differs."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
