"""What an answer holds, in the words of the index, so that the invariants can judge it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from schemas.documents import DocumentKey
from schemas.events import PlannedChunk
from streams.core.chunk_identity import chunk_ids
from streams.core.splitting import embedding_text


def served_passages(results: Sequence[Mapping[str, Any]], tenant: str) -> dict[DocumentKey, dict[str, int]]:
    """Document → id of each passage in the answer → version that wrote it.

    The ids are made anew from what a reader got: nothing of the index has to be asked for.

    Args:
        results: ``results`` of a query response.
        tenant: the reader's.
    """
    documents: dict[DocumentKey, list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        documents[DocumentKey(tenant, result["document_id"])].append(result)
    served = {}
    for key, mine in documents.items():
        mine.sort(key=lambda result: result["span"][0])  # equal passages are numbered in their order
        ids = chunk_ids(key, [_planned(result) for result in mine])
        served[key] = {name: int(result["version"]) for name, result in zip(ids, mine, strict=True)}
    return served


def _planned(result: Mapping[str, Any]) -> PlannedChunk:
    start, end = result["span"]
    bare = PlannedChunk(
        text=result["text"], heading_path=tuple(result["heading_path"]), start=start, end=end, text_sha256=""
    )
    named = sha256(embedding_text(result["title"], bare).encode()).hexdigest()
    return bare.model_copy(update={"text_sha256": named})
