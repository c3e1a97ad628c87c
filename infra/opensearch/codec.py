"""Encoding of passages, manifests, vectors and searches for OpenSearch. Pure."""

import base64
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final

import numpy as np

from infra.opensearch.port import ChunkWrite, FieldStatistics, FoundPassage, ScannedChunk
from schemas.documents import DocumentKey, LifeState
from schemas.index import PUBLIC_GROUP, Manifest, StoredChunk, metadata_term, metadata_terms, metadata_text
from schemas.positions import Position
from schemas.search import Hit, HybridSearch, Vector

CHUNK_SOURCE: Final = [name for name in StoredChunk.model_fields if name != "text_sha256"]
"""Stored fields of a passage that answers need: all but vector, lexical field and hash of the text."""


_HIT_FIELDS: Final = ["chunk_id", "document_id", "position"]
"""Fields of a hit. The position of the event identifies the write of a passage."""

MAX_RESULTS: Final = 10_000
"""Maximum number of hits per request."""

_MAX_ID_BYTES: Final = 512

_POSITION_STATE: Final = "position"
"""Value of the field ``state`` of a position in the manifest index."""

PASSAGES_PAGE: Final = 1_000

_TERMS_ONLY: Final = {
    "fields": ["lexical"],
    "positions": False,
    "offsets": False,
    "payloads": False,
    "field_statistics": False,
}


def chunk_body(write: ChunkWrite) -> dict[str, Any]:
    """The stored form of a passage."""
    chunk = write.chunk
    return (
        chunk.model_dump(mode="json")
        | _searched_fields(chunk)
        | {
            # As float32, which is serialized with half the digits of Python's floats.
            "vector": np.ascontiguousarray(write.vector, dtype=np.float32),
        }
    )


def _searched_fields(chunk: StoredChunk) -> dict[str, Any]:
    """Fields for searches only, derived from the fields of the passage."""
    return {
        "groups": list(chunk.groups) or [PUBLIC_GROUP],
        "lexical": lexical_text(chunk),
        "metadata_terms": metadata_terms(chunk.metadata),
    }


def lexical_text(chunk: StoredChunk) -> str:
    """Text of a passage for the lexical retriever."""
    parts = [chunk.title or "", *chunk.heading_path, chunk.text]
    return "\n".join(part for part in parts if part)


def read_chunk(source: Mapping[str, Any]) -> StoredChunk:
    """Decode a passage. ``text`` and its hash may be missing."""
    groups = tuple(group for group in source["groups"] if group != PUBLIC_GROUP)
    return StoredChunk.model_validate({"text": "", "text_sha256": "", **source, "groups": groups})


def read_scanned(source: Mapping[str, Any]) -> ScannedChunk:
    """Decode a complete passage without its vector."""
    chunk = read_chunk(source)
    searched = _searched_fields(chunk)
    return ScannedChunk(chunk, consistent={name: source.get(name) for name in searched} == searched)


def read_passage(source: Mapping[str, Any]) -> ChunkWrite:
    """Decode a passage with its vector."""
    chunk = {name: value for name, value in source.items() if name != "vector"}
    return ChunkWrite(read_chunk(chunk), np.array(source["vector"], dtype=np.float32))


def manifest_id(key: DocumentKey) -> str:
    """Id of a document's manifest: the key, or its hash if the key exceeds the maximum length of ids."""
    name = str(key)
    # They cannot collide: a key contains a slash, a hash does not.
    return name if len(name.encode()) <= _MAX_ID_BYTES else sha256(name.encode()).hexdigest()


def manifest_body(manifest: Manifest) -> dict[str, Any]:
    """The stored form of a manifest: the model as an opaque object, and fields for searches."""
    position = Position.parse(manifest.position)
    listed = manifest.listed
    return {
        "tenant": manifest.tenant,
        "document_id": manifest.document_id,
        "version": manifest.version,
        "state": listed.state,
        "connector": listed.connector,
        "complete": manifest.complete,
        "partition": position.partition,
        "offset": position.offset,
        "manifest": manifest.model_dump(mode="json", exclude_defaults=True),
    }


def live_documents(tenant: str, connector: str | None, after: str | None, limit: int) -> dict[str, Any]:
    """Request body for manifests of live documents, ordered by id."""
    wanted = [{"term": {"tenant": tenant}}, {"term": {"state": LifeState.LIVE}}]
    if connector is not None:
        wanted.append({"term": {"connector": connector}})
    return {
        "size": limit,
        "query": {"bool": {"filter": wanted}},
        "sort": ["document_id"],
        "_source": ["manifest"],
        **({"search_after": [after]} if after is not None else {}),
    }


def read_manifest(source: Mapping[str, Any]) -> Manifest:
    """Decode a manifest."""
    return Manifest.model_validate(source["manifest"])


ALL_MANIFESTS: Final[Mapping[str, Any]] = {
    "_source": ["manifest"],
    "query": {"bool": {"must_not": [{"term": {"state": _POSITION_STATE}}]}},
}
"""Request body for all manifests, without the positions in the same index."""


def position_lines(tenant: str, partition: int, offset: int) -> list[dict[str, Any]]:
    """Bulk lines that advance a tenant's position in a partition. A lower offset than the stored one is a conflict."""
    # Cannot collide with manifest ids, which contain a slash or are hashes.
    action = {"index": {"_id": f"{tenant}:{partition}", "version": offset, "version_type": "external_gte"}}
    return [action, {"tenant": tenant, "state": _POSITION_STATE, "partition": partition, "offset": offset}]


def positions_of(tenant: str) -> dict[str, Any]:
    """Request body for a tenant's positions."""
    mine = [{"term": {"tenant": tenant}}, {"term": {"state": _POSITION_STATE}}]
    return {"size": MAX_RESULTS, "_source": ["partition", "offset"], "query": {"bool": {"filter": mine}}}


def read_positions(response: Mapping[str, Any]) -> dict[int, int]:
    """Partition → offset."""
    return {one["_source"]["partition"]: one["_source"]["offset"] for one in response["hits"]["hits"]}


def vector_body(vector: Vector, stored_ms: int) -> dict[str, Any]:
    """The stored form of a vector, in full precision, so that it equals a computed vector bit by bit."""
    return {"stored_ms": stored_ms, "vector": base64.b64encode(vector.astype("<f4").tobytes()).decode()}


def read_vector(source: Mapping[str, Any]) -> Vector:
    """Decode a vector."""
    return np.frombuffer(base64.b64decode(source["vector"]), dtype="<f4").astype(np.float32)


def search_bodies(search: HybridSearch, *, ef_search: int) -> list[dict[str, Any]]:
    """Request bodies of the vector and the lexical search.

    Both contain the access filter. In the vector search it is part of the k-NN query, so that it restricts the graph
    traversal. As a post-filter, it would reduce the number of candidates.
    """
    allowed = {"bool": {"filter": _filters(search)}}
    # Doc values instead of ``_id``, which is stored with the texts in compressed blocks: decompression of hundreds of
    # them takes longer than the rest of a search.
    shared: dict[str, Any] = {
        "size": search.candidates,
        "stored_fields": "_none_",
        "docvalue_fields": _HIT_FIELDS,
        "track_total_hits": False,
    }
    lexical = {"bool": {"must": [{"match": {"lexical": {"query": search.text}}}], **allowed["bool"]}}
    return [shared | {"query": _nearest(search, allowed, ef_search)}, shared | {"query": lexical}]


def _nearest(search: HybridSearch, allowed: Mapping[str, Any], ef_search: int) -> dict[str, Any]:
    vector = np.ascontiguousarray(search.vector, dtype=np.float32)
    if search.exact:
        params = {"field": "vector", "query_value": vector, "space_type": "cosinesimil"}
        return {"script_score": {"query": allowed, "script": {"source": "knn_score", "lang": "knn", "params": params}}}
    knn = {
        "vector": vector,
        "k": search.candidates,
        "method_parameters": {"ef_search": max(search.candidates, ef_search)},
        "filter": allowed,
    }
    return {"knn": {"vector": knn}}


def search_lines(search: HybridSearch, copy: str, *, ef_search: int) -> list[dict[str, Any]]:
    """Both searches as lines of ``_msearch``.

    Args:
        search: the search.
        copy: preference, so that equal values read the same shard copies.
        ef_search: see ``OpenSearchSettings``.
    """
    vector, lexical = search_bodies(search, ef_search=ef_search)
    # With statistics of all shards, a score is independent of the shard, and evaluation can compute it.
    global_statistics = {"preference": copy, "search_type": "dfs_query_then_fetch"}
    return [{"preference": copy}, vector, global_statistics, lexical]


def read_hits(response: Mapping[str, Any], tenant: str) -> tuple[Hit, ...]:
    """Candidates of one retriever."""
    candidates = []
    for hit in response["hits"]["hits"]:
        fields = hit["fields"]
        key = _key_of(tenant, fields["document_id"][0])
        candidates.append(Hit(fields["chunk_id"][0], key, hit["_score"], (hit["_index"], fields["position"][0])))
    return tuple(candidates)


@lru_cache(100_000)
def _key_of(tenant: str, document_id: str) -> DocumentKey:
    # Cached: each search returns hundreds of passages, mostly of documents that earlier searches returned.
    return DocumentKey(tenant, document_id)


def chunks_of(key: DocumentKey, after: str | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """Request body and parameters for ids of a document's passages: the first ``MAX_RESULTS`` after ``after``."""
    own = [{"term": {"tenant": key.tenant}}, {"term": {"document_id": key.document_id}}]
    page: dict[str, Any] = {"stored_fields": "_none_", "docvalue_fields": ["chunk_id"], "size": MAX_RESULTS}
    page |= {"sort": ["chunk_id"]} | ({} if after is None else {"search_after": [after]})
    return page | {"query": {"bool": {"filter": own}}}, {"routing": str(key)}


def read_ids(response: Mapping[str, Any]) -> tuple[str, ...]:
    """Ids of the passages of a response."""
    return tuple(hit["fields"]["chunk_id"][0] for hit in response["hits"]["hits"])


def passages_of(keys: Sequence[DocumentKey], after: Sequence[Any] | None) -> dict[str, Any]:
    """Request body for a page of all passages of documents. It may include documents of other tenants."""
    own = [
        {"terms": {"tenant": sorted({key.tenant for key in keys})}},
        {"terms": {"document_id": sorted({key.document_id for key in keys})}},
    ]
    page = {
        "size": PASSAGES_PAGE,
        "version": True,
        "sort": [{"chunk_id": "asc"}],
        "track_total_hits": False,
        "_source": {"excludes": ["vector", "lexical", "text"]},
        "query": {"bool": {"filter": own}},
    }
    return page if after is None else page | {"search_after": list(after)}


def read_found(hit: Mapping[str, Any]) -> FoundPassage:
    """Decode a passage without text, and the version of its last write."""
    return FoundPassage(read_chunk(hit["_source"]), int(hit["_version"]))


def _filters(search: HybridSearch) -> list[dict[str, Any]]:
    access = search.access
    filters: list[dict[str, Any]] = [
        {"term": {"tenant": access.tenant}},
        {"terms": {"groups": [PUBLIC_GROUP, *access.groups]}},
    ]
    for name, wanted in search.filters.items():
        values = wanted if isinstance(wanted, tuple) else (wanted,)
        metadata_name = name.removeprefix("metadata.")
        if metadata_name != name:
            filters.append({"terms": {"metadata_terms": [metadata_term(metadata_name, value) for value in values]}})
        else:
            filters.append({"terms": {name: [metadata_text(value) for value in values]}})
    return filters


def term_vectors(index: str, hit: Hit) -> dict[str, Any]:
    """Request for the terms of a stored passage."""
    return {"_index": index, "_id": hit.chunk_id, "routing": str(hit.key)} | _TERMS_ONLY


def analysis(index: str, text: str) -> dict[str, Any]:
    """Request for the terms of a text."""
    return {"_index": index, "doc": {"lexical": text}} | _TERMS_ONLY


def shard_statistics(index: str, terms: Collection[str], routing: str) -> dict[str, Any]:
    """Request for statistics of one shard. The terms are analyzed already, so they are only split at white space."""
    return {
        "_index": index,
        "doc": {"lexical": " ".join(terms)},
        "routing": routing,
        "per_field_analyzer": {"lexical": "whitespace"},
    } | (_TERMS_ONLY | {"term_statistics": True, "field_statistics": True})


def read_terms(doc: Mapping[str, Any]) -> dict[str, int]:
    """Term → frequency; empty if the text has no terms."""
    found = doc["term_vectors"].get("lexical", {"terms": {}})["terms"]
    return {term: counted["term_freq"] for term, counted in found.items()}


def read_statistics(shards: Sequence[Mapping[str, Any]], terms: Collection[str]) -> FieldStatistics:
    """Sum of the statistics of all shards. A shard without passages has none."""
    count, length, frequencies = 0, 0, dict.fromkeys(terms, 0)
    for shard in shards:
        field = shard["term_vectors"].get("lexical")
        if field is None or "field_statistics" not in field:
            continue
        # Lucene returns -1 for unknown values.
        count += max(field["field_statistics"]["doc_count"], 0)
        length += max(field["field_statistics"]["sum_ttf"], 0)
        for term, counted in field["terms"].items():
            if term in frequencies:
                frequencies[term] += counted.get("doc_freq", 0)
    return FieldStatistics(count, length, frequencies)
