"""What may stand together in an answer: passages of one version of a document, never of two (I3)."""

from collections import defaultdict
from collections.abc import Collection, Iterable

from schemas.documents import DocumentKey
from schemas.index import Manifest, StoredChunk, original_id


def in_doubt(passages: Iterable[StoredChunk]) -> dict[DocumentKey, frozenset[str]]:
    """Documents whose passages were written by several events, or are there twice → ids of these passages.

    Mostly they are of one version all the same, which took passages over from the versions before it.
    """
    by_document: defaultdict[DocumentKey, list[StoredChunk]] = defaultdict(list)
    for passage in passages:
        by_document[passage.key].append(passage)
    return {
        key: frozenset(passage.chunk_id for passage in found)
        for key, found in by_document.items()
        if len({(passage.version, passage.position) for passage in found}) > 1
        or len({original_id(passage.chunk_id) for passage in found}) < len(found)
    }


def belong_together(chunk_ids: Collection[str], manifest: Manifest) -> bool:
    """True if all of them are of the manifest's version, or all are of the one that it is to replace."""
    versions = (manifest, manifest.previous) if manifest.previous else (manifest,)
    return any(frozenset(version.chunks).issuperset(chunk_ids) for version in versions)
