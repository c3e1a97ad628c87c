"""What may stand together in an answer: passages of one version of a document, never of two (I3)."""

from collections import defaultdict
from collections.abc import Collection, Iterable

from schemas.documents import DocumentKey
from schemas.index import Manifest, StoredChunk


def in_doubt(passages: Iterable[StoredChunk]) -> dict[DocumentKey, frozenset[str]]:
    """Documents whose passages were written by several versions → ids of these passages.

    Mostly they are of one version all the same, which took passages over from the versions before it.
    """
    by_document: defaultdict[DocumentKey, list[StoredChunk]] = defaultdict(list)
    for passage in passages:
        by_document[passage.key].append(passage)
    return {
        key: frozenset(passage.chunk_id for passage in found)
        for key, found in by_document.items()
        if any(passage.version != found[0].version for passage in found)
    }


def belong_together(chunk_ids: Collection[str], manifest: Manifest) -> bool:
    """True if all of them are of the manifest's version, or all are of a version that it is to replace."""
    return any(frozenset(version).issuperset(chunk_ids) for version in (manifest.chunks, *manifest.before))


def replaced_versions(claim: Manifest) -> list[tuple[frozenset[str], frozenset[str]]]:
    """Of each version that may serve until the claim is complete: its passages, and those that may not be there.

    The others are passages that the claim keeps.
    """
    kept = frozenset(claim.chunks).difference(claim.added)
    return [(frozenset(version), frozenset(version) - kept) for version in claim.before]
