"""Passages, manifests, vectors and searches as OpenSearch speaks of them. Pure."""

import base64
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final

import numpy as np

from infra.opensearch.port import ChunkWrite, Hit, HybridSearch, Vector
from schemas.documents import DocumentKey
from schemas.index import PUBLIC_GROUP, Manifest, StoredChunk, metadata_terms, metadata_text
from schemas.positions import Position

CHUNK_SOURCE: Final = [name for name in StoredChunk.model_fields if name != "text_sha256"]
"""What an answer needs of a passage: everything but its vector, its lexical field and its text's hash."""


_MAX_ID_BYTES: Final = 512


def chunk_body(write: ChunkWrite) -> dict[str, Any]:
    """The stored form of a passage."""
    chunk = write.chunk
    body = chunk.model_dump(mode="json")
    lexical = [chunk.title or "", *chunk.heading_path, chunk.text]
    return body | {
        "groups": list(chunk.groups) or [PUBLIC_GROUP],
        "lexical": "\n".join(part for part in lexical if part),
        "metadata_terms": metadata_terms(chunk.metadata),
        "vector": write.vector.tolist(),
    }


def read_chunk(source: Mapping[str, Any]) -> StoredChunk:
    """A passage from its stored form; ``text`` and its hash may have been left out of the request."""
    groups = tuple(group for group in source["groups"] if group != PUBLIC_GROUP)
    return StoredChunk.model_validate({"text": "", "text_sha256": "", **source, "groups": groups})


def manifest_id(key: DocumentKey) -> str:
    """Name of a document's manifest: the key itself, or its hash where the key is longer than OpenSearch takes."""
    name = str(key)
    # The slash keeps the two kinds apart: a key has one, a hash has none.
    return name if len(name.encode()) <= _MAX_ID_BYTES else sha256(name.encode()).hexdigest()


def manifest_body(manifest: Manifest) -> dict[str, Any]:
    """The stored form of a manifest: the model as one opaque object beside the fields that operators search."""
    position = Position.parse(manifest.position)
    return {
        "tenant": manifest.tenant,
        "document_id": manifest.document_id,
        "version": manifest.version,
        "state": manifest.state,
        "complete": manifest.complete,
        "partition": position.partition,
        "offset": position.offset,
        "manifest": manifest.model_dump(mode="json", exclude_defaults=True),
    }


def read_manifest(source: Mapping[str, Any]) -> Manifest:
    """A manifest from its stored form."""
    return Manifest.model_validate(source["manifest"])


def vector_body(vector: Vector, stored_ms: int) -> dict[str, Any]:
    """The stored form of a vector: full precision, so that a stored vector equals a computed one bit by bit."""
    return {"stored_ms": stored_ms, "vector": base64.b64encode(vector.astype("<f4").tobytes()).decode()}


def read_vector(source: Mapping[str, Any]) -> Vector:
    """A vector from its stored form."""
    return np.frombuffer(base64.b64decode(source["vector"]), dtype="<f4").astype(np.float32)


def search_bodies(search: HybridSearch) -> list[dict[str, Any]]:
    """Request bodies of the vector leg and of the lexical leg.

    Both carry the whole access filter; in the vector leg it is inside the k-NN query, where it limits the graph walk
    itself, and not behind it, where it would thin out the window.
    """
    allowed = {"bool": {"filter": _filters(search)}}
    shared: dict[str, Any] = {"size": search.window, "_source": False, "track_total_hits": False}
    knn = {"vector": {"vector": search.vector.tolist(), "k": search.window, "filter": allowed}}
    lexical = {"bool": {"must": [{"match": {"lexical": {"query": search.text}}}], **allowed["bool"]}}
    return [shared | {"query": {"knn": knn}}, shared | {"query": lexical}]


def read_hits(response: Mapping[str, Any]) -> tuple[Hit, ...]:
    """The window of one leg."""
    return tuple(
        Hit(hit["_id"], DocumentKey.parse(hit["_routing"]), float(hit["_score"])) for hit in response["hits"]["hits"]
    )


def _filters(search: HybridSearch) -> list[dict[str, Any]]:
    access = search.access
    filters: list[dict[str, Any]] = [
        {"term": {"tenant": access.tenant}},
        {"terms": {"groups": [PUBLIC_GROUP, *access.groups]}},
    ]
    for name, wanted in search.filters.items():
        values = [metadata_text(value) for value in (wanted if isinstance(wanted, tuple) else (wanted,))]
        metadata_name = name.removeprefix("metadata.")
        if metadata_name != name:
            filters.append({"terms": {"metadata_terms": [f"{metadata_name}={value}" for value in values]}})
        else:
            filters.append({"terms": {name: values}})
    return filters
