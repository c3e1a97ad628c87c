"""Response bodies: a cacheable part, and per-request fields that are added to it. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from query.retrieval.fusion import FusedHit
from schemas.index import StoredChunk
from schemas.positions import AsOf
from schemas.queries import GeneratedAnswer, Result, Unanswered

_MAX_ENCODED: Final = 8_192
"""Encoded positions kept."""


def response_body(
    passages: Sequence[tuple[FusedHit, StoredChunk]],
    generated: GeneratedAnswer | None,
    *,
    include_metadata: bool,
    unanswered: Unanswered | None = None,
) -> bytes:
    """The cacheable part of ``QueryResponse`` as a JSON object."""
    return orjson.dumps(
        {
            "results": results(passages, include_metadata=include_metadata),
            "answer": generated.text if generated else None,
            "citations": [citation.model_dump() for citation in generated.citations] if generated else None,
            "unanswered": unanswered,
        }
    )


def results(passages: Sequence[tuple[FusedHit, StoredChunk]], *, include_metadata: bool) -> list[dict[str, Any]]:
    """``QueryResponse.results``, JSON-serializable."""
    return [_result(hit, chunk, include_metadata).model_dump() for hit, chunk in passages]


def stamped(body: bytes, *, query_time_ms: float, cached: bool, as_of: AsOf) -> bytes:
    """The whole ``QueryResponse``: ``body`` with the per-request fields, added without parsing it."""
    return _joined(body, query_time_ms, b"true" if cached else b"false", _positions(as_of.positions), as_of.checked_ms)


class Stamp:
    """Adds the per-request fields to cached answers. Caches encoded positions, which many answers share."""

    def __init__(self) -> None:
        # Keyed by id(). The stored mapping keeps the id from being reused.
        self._encoded: dict[int, tuple[Mapping[int, int], bytes]] = {}

    def on(self, body: bytes, positions: Mapping[int, int], checked_ms: float, *, query_time_ms: float) -> bytes:
        """As ``stamped`` for a cached answer. ``positions`` must not be modified afterwards."""
        entry = self._encoded.get(id(positions))
        if entry is None:
            if len(self._encoded) >= _MAX_ENCODED:
                self._encoded.clear()
            entry = self._encoded[id(positions)] = (positions, _positions(positions))
        return _joined(body, query_time_ms, b"true", entry[1], checked_ms)


def _joined(body: bytes, query_time_ms: float, cached: bytes, positions: bytes, checked_ms: float) -> bytes:
    return b'%b,"query_time_ms":%b,"cached":%b,"as_of":{"positions":%b,"checked_ms":%b}}' % (
        body[:-1],
        orjson.dumps(round(query_time_ms, 3)),
        cached,
        positions,
        orjson.dumps(checked_ms),
    )


def _positions(positions: Mapping[int, int]) -> bytes:
    return orjson.dumps({str(partition): offset for partition, offset in positions.items()})


def _result(hit: FusedHit, chunk: StoredChunk, include_metadata: bool) -> Result:  # noqa: FBT001 - private, one caller
    return Result(
        text=chunk.text,
        score=hit.score,
        document_id=chunk.document_id,
        version=chunk.version,
        title=chunk.title,
        source=chunk.source,
        heading_path=chunk.heading_path,
        span=(chunk.start, chunk.end),
        metadata=dict(chunk.metadata) if include_metadata else None,
    )
