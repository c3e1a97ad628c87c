"""Passages, manifests, vectors and searches as OpenSearch speaks of them. Pure."""

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
"""What an answer needs of a passage: everything but its vector, its lexical field and its text's hash."""


_HIT_FIELDS: Final = ["chunk_id", "document_id", "position"]
"""What a search tells of a passage. An event writes a passage in one way, so its position names the write."""

MAX_RESULTS: Final = 10_000
"""Hits that OpenSearch gives for one request, at most."""

_MAX_ID_BYTES: Final = 512

_POSITION_STATE: Final = "position"
"""In place of a document's state, of what is no manifest but a position."""

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
            # Its own precision has half the digits of Python's numbers, for both sides to write and to read.
            "vector": np.ascontiguousarray(write.vector, dtype=np.float32),
        }
    )


def _searched_fields(chunk: StoredChunk) -> dict[str, Any]:
    """Fields that only searches read, made from the passage's own."""
    return {
        "groups": list(chunk.groups) or [PUBLIC_GROUP],
        "lexical": lexical_text(chunk),
        "metadata_terms": metadata_terms(chunk.metadata),
    }


def lexical_text(chunk: StoredChunk) -> str:
    """What the lexical leg searches of a passage."""
    parts = [chunk.title or "", *chunk.heading_path, chunk.text]
    return "\n".join(part for part in parts if part)


def read_chunk(source: Mapping[str, Any]) -> StoredChunk:
    """A passage from its stored form; ``text`` and its hash may have been left out of the request."""
    groups = tuple(group for group in source["groups"] if group != PUBLIC_GROUP)
    return StoredChunk.model_validate({"text": "", "text_sha256": "", **source, "groups": groups})


def read_scanned(source: Mapping[str, Any]) -> ScannedChunk:
    """A passage from its stored form, whole but for its vector."""
    chunk = read_chunk(source)
    searched = _searched_fields(chunk)
    return ScannedChunk(chunk, consistent={name: source.get(name) for name in searched} == searched)


def read_passage(source: Mapping[str, Any]) -> ChunkWrite:
    """A passage with its vector from its stored form."""
    chunk = {name: value for name, value in source.items() if name != "vector"}
    return ChunkWrite(read_chunk(chunk), np.array(source["vector"], dtype=np.float32))


def manifest_id(key: DocumentKey) -> str:
    """Name of a document's manifest: the key itself, or its hash where the key is longer than OpenSearch takes."""
    name = str(key)
    # The slash keeps the two kinds apart: a key has one, a hash has none.
    return name if len(name.encode()) <= _MAX_ID_BYTES else sha256(name.encode()).hexdigest()


def manifest_body(manifest: Manifest) -> dict[str, Any]:
    """The stored form of a manifest: the model as one opaque object beside the fields that are searched."""
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
    """The search for manifests of live documents by id."""
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
    """A manifest from its stored form."""
    return Manifest.model_validate(source["manifest"])


ALL_MANIFESTS: Final[Mapping[str, Any]] = {
    "_source": ["manifest"],
    "query": {"bool": {"must_not": [{"term": {"state": _POSITION_STATE}}]}},
}
"""Search for manifests alone: positions lie in the same index."""


def position_lines(tenant: str, partition: int, offset: int) -> list[dict[str, Any]]:
    """Bulk lines that advance a tenant's position in a partition; a lower offset than the one stored is refused."""
    # A manifest's id has a slash or is a hash: neither has a colon without a slash.
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
    """The stored form of a vector: full precision, so that a stored vector equals a computed one bit by bit."""
    return {"stored_ms": stored_ms, "vector": base64.b64encode(vector.astype("<f4").tobytes()).decode()}


def read_vector(source: Mapping[str, Any]) -> Vector:
    """A vector from its stored form."""
    return np.frombuffer(base64.b64decode(source["vector"]), dtype="<f4").astype(np.float32)


def search_bodies(search: HybridSearch, *, ef_search: int) -> list[dict[str, Any]]:
    """Request bodies of the vector leg and of the lexical leg.

    The vector stays an array: written as the numbers of its own precision it has half the digits, for both sides.

    Both carry the whole access filter; in the vector leg it is inside the k-NN query, where it limits the graph walk
    itself, and not behind it, where it would thin out the window.
    """
    allowed = {"bool": {"filter": _filters(search)}}
    # Ids are stored with the texts, in compressed blocks: to unpack hundreds of them takes the index more than all the
    # rest of a search. Columns tell the same.
    shared: dict[str, Any] = {
        "size": search.window,
        "stored_fields": "_none_",
        "docvalue_fields": _HIT_FIELDS,
        "track_total_hits": False,
    }
    lexical = {"bool": {"must": [{"match": {"lexical": {"query": search.text}}}], **allowed["bool"]}}
    return [shared | {"query": _nearest(search, allowed, ef_search)}, shared | {"query": lexical}]


def _nearest(search: HybridSearch, allowed: Mapping[str, Any], ef_search: int) -> dict[str, Any]:
    vector = np.ascontiguousarray(search.vector, dtype=np.float32)
    if search.exact:
        asked = {"field": "vector", "query_value": vector, "space_type": "cosinesimil"}
        return {"script_score": {"query": allowed, "script": {"source": "knn_score", "lang": "knn", "params": asked}}}
    walk = {
        "vector": vector,
        "k": search.window,
        "method_parameters": {"ef_search": max(search.window, ef_search)},
        "filter": allowed,
    }
    return {"knn": {"vector": walk}}


def search_lines(search: HybridSearch, copy: str, *, ef_search: int) -> list[dict[str, Any]]:
    """Both legs as lines of ``_msearch``.

    Args:
        search: what is searched.
        copy: names the copies of shards that are asked.
        ef_search: see ``OpenSearchSettings``.
    """
    vector, lexical = search_bodies(search, ef_search=ef_search)
    # Statistics of all shards together: a score is the same on every shard, and can be computed elsewhere.
    whole = {"preference": copy, "search_type": "dfs_query_then_fetch"}
    return [{"preference": copy}, vector, whole, lexical]


def read_hits(response: Mapping[str, Any], tenant: str) -> tuple[Hit, ...]:
    """The window of one leg of a search in a tenant's documents."""
    window = []
    for hit in response["hits"]["hits"]:
        told = hit["fields"]
        key = _key_of(tenant, told["document_id"][0])
        window.append(Hit(told["chunk_id"][0], key, hit["_score"], (hit["_index"], told["position"][0])))
    return tuple(window)


@lru_cache(100_000)
def _key_of(tenant: str, document_id: str) -> DocumentKey:
    """Each search finds hundreds of passages, mostly of documents that were found before."""
    return DocumentKey(tenant, document_id)


def chunks_of(key: DocumentKey, after: str | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """Request body and parameters for passages of a document: the first ``MAX_RESULTS`` whose ids follow ``after``."""
    own = [{"term": {"tenant": key.tenant}}, {"term": {"document_id": key.document_id}}]
    wanted: dict[str, Any] = {"stored_fields": "_none_", "docvalue_fields": ["chunk_id"], "size": MAX_RESULTS}
    wanted |= {"sort": ["chunk_id"]} | ({} if after is None else {"search_after": [after]})
    return wanted | {"query": {"bool": {"filter": own}}}, {"routing": str(key)}


def read_ids(response: Mapping[str, Any]) -> tuple[str, ...]:
    """Ids of the passages that were found."""
    return tuple(hit["fields"]["chunk_id"][0] for hit in response["hits"]["hits"])


def passages_of(keys: Sequence[DocumentKey], after: Sequence[Any] | None) -> dict[str, Any]:
    """Request body for a page of all passages of documents; some of other tenants' documents may be among them."""
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
    """A passage without text, and the version of its last write."""
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
    """Request for the terms of a text that is not stored."""
    return {"_index": index, "doc": {"lexical": text}} | _TERMS_ONLY


def shard_statistics(index: str, terms: Collection[str], routing: str) -> dict[str, Any]:
    """Request for the statistics of one shard. The terms are analysed already, so they are only taken apart again."""
    return {
        "_index": index,
        "doc": {"lexical": " ".join(terms)},
        "routing": routing,
        "per_field_analyzer": {"lexical": "whitespace"},
    } | (_TERMS_ONLY | {"term_statistics": True, "field_statistics": True})


def read_terms(doc: Mapping[str, Any]) -> dict[str, int]:
    """Term → how often; nothing where the text has no terms."""
    found = doc["term_vectors"].get("lexical", {"terms": {}})["terms"]
    return {term: counted["term_freq"] for term, counted in found.items()}


def read_statistics(shards: Sequence[Mapping[str, Any]], terms: Collection[str]) -> FieldStatistics:
    """The sum over the shards. A shard without passages tells nothing of its field."""
    count, length, frequencies = 0, 0, dict.fromkeys(terms, 0)
    for shard in shards:
        told = shard["term_vectors"].get("lexical")
        if told is None or "field_statistics" not in told:
            continue
        # Lucene says -1 where it does not know.
        count += max(told["field_statistics"]["doc_count"], 0)
        length += max(told["field_statistics"]["sum_ttf"], 0)
        for term, counted in told["terms"].items():
            if term in frequencies:
                frequencies[term] += counted.get("doc_freq", 0)
    return FieldStatistics(count, length, frequencies)
