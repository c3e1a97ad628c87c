"""Names the passages of an answer by what a reader sees of them, so that the invariants check answers and not ids."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from schemas.documents import DocumentKey
from schemas.events import PlannedChunk
from schemas.index import StoredChunk, original_id


class Shown(NamedTuple):
    """What a reader sees of a passage, and which version wrote it."""

    title: str | None
    source: str | None
    heading_path: tuple[str, ...]
    text: str
    version: int


def planned_passages(title: str | None, source: str | None, chunks: Iterable[PlannedChunk]) -> frozenset[str]:
    """Names of the passages that a document version with these attributes and chunks should have."""
    return frozenset(_named(Shown(title, source, one.heading_path, one.text, 0) for one in chunks))


def stored_passages(chunks: Iterable[StoredChunk]) -> dict[str, int]:
    """Name of each stored passage of one document → version that wrote it.

    Passages are there twice while a version replaces them that shows the same: copies, and those that differ in what
    readers do not see. Of these the oldest counts.
    """
    oldest: dict[str, StoredChunk] = {}
    for one in sorted(chunks, key=lambda one: one.version):
        oldest.setdefault(original_id(one.chunk_id), one)
    alike: dict[str, list[Shown]] = defaultdict(list)
    for one in oldest.values():
        unseen = json.dumps([one.groups, one.metadata], sort_keys=True)
        alike[unseen].append(Shown(one.title, one.source, one.heading_path, one.text, one.version))
    named: dict[str, int] = {}
    for shown in alike.values():
        for name, version in _named(shown).items():
            named[name] = min(version, named.get(name, version))
    return named


def served_passages(results: Sequence[Mapping[str, Any]], tenant: str) -> dict[DocumentKey, dict[str, int]]:
    """Passages of an answer: document → passage name → version that wrote it.

    Args:
        results: ``results`` of a query response.
        tenant: tenant of the client.
    """
    documents: dict[DocumentKey, list[Shown]] = defaultdict(list)
    for one in results:
        shown = Shown(one["title"], one["source"], tuple(one["heading_path"]), one["text"], int(one["version"]))
        documents[DocumentKey(tenant, one["document_id"])].append(shown)
    return {key: _named(shown) for key, shown in documents.items()}


def _named(shown: Iterable[Shown]) -> dict[str, int]:
    """Equal passages of a document are numbered, as a document may have the same one twice."""
    seen: Counter[str] = Counter()
    named = {}
    for one in sorted(shown, key=lambda one: one.version):
        content = sha256(json.dumps(one._replace(version=0)).encode()).hexdigest()
        named[f"{content[:20]}-{seen[content]}"] = one.version
        seen[content] += 1
    return named
