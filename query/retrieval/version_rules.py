"""Rules for passages that may be returned together: one version of a document per answer (I3). Pure."""

from collections import defaultdict
from collections.abc import Collection, Iterable

from schemas.documents import DocumentKey
from schemas.index import Manifest, StoredChunk, original_id


def written_by_several_events(passages: Iterable[StoredChunk]) -> dict[DocumentKey, frozenset[str]]:
    """Documents whose passages were written by several events, or exist twice as copies → ids of these passages.

    Usually they belong to one version, which kept unchanged passages of earlier versions.
    """
    by_document: defaultdict[DocumentKey, list[StoredChunk]] = defaultdict(list)
    for passage in passages:
        by_document[passage.key].append(passage)
    return {
        key: frozenset(passage.chunk_id for passage in group)
        for key, group in by_document.items()
        if len({(passage.version, passage.position) for passage in group}) > 1
        or len({original_id(passage.chunk_id) for passage in group}) < len(group)
    }


def are_of_one_version(chunk_ids: Collection[str], manifest: Manifest) -> bool:
    """Whether all passages belong to the manifest's version, or all to the version that it replaces."""
    versions = (manifest, manifest.previous) if manifest.previous else (manifest,)
    return any(frozenset(version.chunks).issuperset(chunk_ids) for version in versions)
