"""Settings and mappings of each OpenSearch index."""

from typing import Any, Final

from schemas.index import LAYOUT, LONGEST_KEYWORD, MANIFESTS_REFRESH

HNSW_M: Final = 16


HNSW_EF_CONSTRUCTION: Final = 200


GC_DELETES: Final = "1h"
"""Retention of versions of deleted ids. It exceeds the time for which a worker that lost its partition can continue to
write; the default of 60 s does not. Later, manifests still contain the version (I2)."""


def chunks_index_body(*, shards: int, replicas: int, dimension: int, engine: str) -> dict[str, Any]:
    """Settings and mapping of a chunk index.

    Refreshes are explicit: a passage becomes searchable when its change is complete. The lexical field contains title,
    headings and text, so BM25 has one length and one set of statistics.
    """
    keyword = {"type": "keyword"}
    stored_only = {"type": "keyword", "index": False, "doc_values": False}
    return {
        "settings": {
            "index": {
                "number_of_shards": shards,
                "number_of_replicas": replicas,
                "refresh_interval": "-1",
                "gc_deletes": GC_DELETES,
                "knn": True,
            }
        },
        "mappings": {
            "dynamic": "strict",
            "_meta": {"layout": LAYOUT},
            "properties": {
                "chunk_id": keyword,
                "tenant": keyword,
                "document_id": keyword,
                "version": {"type": "long"},
                "position": keyword,
                "groups": keyword,
                "title": {"type": "keyword", "ignore_above": LONGEST_KEYWORD},
                "source": {"type": "keyword", "ignore_above": LONGEST_KEYWORD},
                "heading_path": stored_only,
                "text": stored_only,
                "text_sha256": stored_only,
                "lexical": {"type": "text", "analyzer": "english", "index_options": "freqs"},
                "start": {"type": "integer", "index": False},
                "end": {"type": "integer", "index": False},
                "metadata": {"type": "object", "enabled": False},
                "metadata_terms": {"type": "keyword", "ignore_above": LONGEST_KEYWORD},
                "vector": {
                    "type": "knn_vector",
                    "dimension": dimension,
                    "method": {
                        "name": "hnsw",
                        "space_type": "cosinesimil",
                        "engine": engine,
                        "parameters": {"m": HNSW_M, "ef_construction": HNSW_EF_CONSTRUCTION},
                    },
                },
            },
        },
    }


def manifests_index_body(*, replicas: int) -> dict[str, Any]:
    """Settings and mapping of a manifest index. It is read by id in real time, and searched for positions."""
    return {
        "settings": {
            "index": {
                "number_of_shards": 1,
                "number_of_replicas": replicas,
                "refresh_interval": MANIFESTS_REFRESH,
            },
        },
        "mappings": {
            "dynamic": False,
            "properties": {
                "tenant": {"type": "keyword"},
                "document_id": {"type": "keyword"},
                "version": {"type": "long"},
                "state": {"type": "keyword"},
                "connector": {"type": "keyword"},
                "complete": {"type": "boolean"},
                "partition": {"type": "integer"},
                "offset": {"type": "long"},
            },
        },
    }


def vectors_index_body(*, replicas: int) -> dict[str, Any]:
    """Settings and mapping of the stored vectors: a key-value store, so that no text is embedded twice."""
    return {
        "settings": {
            "index": {"number_of_shards": 1, "number_of_replicas": replicas, "refresh_interval": "30s"},
        },
        "mappings": {"dynamic": False, "properties": {"stored_ms": {"type": "date", "format": "epoch_millis"}}},
    }


def webhooks_index_body(*, replicas: int) -> dict[str, Any]:
    """Settings and mapping of the webhooks. One shard, so that a response contains all of them or none."""
    return {
        "settings": {"index": {"number_of_shards": 1, "number_of_replicas": replicas}},
        "mappings": {
            "dynamic": False,
            "properties": {"webhook_id": {"type": "keyword"}, "created_ms": {"type": "double"}},
        },
    }


def waiting_index_body(*, replicas: int) -> dict[str, Any]:
    """Settings and mapping of waiting messages. They are few unless a receiver is unavailable."""
    return {
        "settings": {"index": {"number_of_shards": 1, "number_of_replicas": replicas, "refresh_interval": "1s"}},
        "mappings": {
            "dynamic": False,
            "properties": {
                "webhook_id": {"type": "keyword"},
                "message_id": {"type": "keyword"},
                "ended_ms": {"type": "double"},
            },
        },
    }


def keys_index_body(*, replicas: int) -> dict[str, Any]:
    """Settings and mapping of the API keys. One shard, so that a response contains all of them or none."""
    return {
        "settings": {"index": {"number_of_shards": 1, "number_of_replicas": replicas}},
        "mappings": {
            "dynamic": False,
            "properties": {"key_id": {"type": "keyword"}, "created_ms": {"type": "double"}},
        },
    }
