"""The response body: results that stay the same while they are cached, stamped anew for each caller."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from query.retrieval.fusion import Candidate
from schemas.index import StoredChunk
from schemas.positions import AsOf
from schemas.queries import GeneratedAnswer, Result, Unanswered

_ENCODED: Final = 8_192
"""Positions kept in encoded form."""


def response_body(
    found: Sequence[tuple[Candidate, StoredChunk]],
    generated: GeneratedAnswer | None,
    *,
    include_metadata: bool,
    unanswered: Unanswered | None = None,
) -> bytes:
    """The part of ``QueryResponse`` that is true for as long as the answer is, as a JSON object."""
    return orjson.dumps(
        {
            "results": results(found, include_metadata=include_metadata),
            "answer": generated.text if generated else None,
            "citations": [citation.model_dump() for citation in generated.citations] if generated else None,
            "unanswered": unanswered,
        }
    )


def results(found: Sequence[tuple[Candidate, StoredChunk]], *, include_metadata: bool) -> list[dict[str, Any]]:
    """``QueryResponse.results``, ready to be encoded."""
    return [_result(candidate, chunk, include_metadata).model_dump() for candidate, chunk in found]


def stamped(body: bytes, *, query_time_ms: float, cached: bool, as_of: AsOf) -> bytes:
    """The whole ``QueryResponse``: ``body`` with what differs from caller to caller, without parsing it again."""
    return _joined(body, query_time_ms, b"true" if cached else b"false", _positions(as_of.positions), as_of.checked_ms)


class Stamp:
    """Stamps answers from the cache; the same positions come again and again, and are encoded once."""

    def __init__(self) -> None:
        # By identity, which the mapping kept beside it makes sure of.
        self._encoded: dict[int, tuple[Mapping[int, int], bytes]] = {}

    def on(self, body: bytes, positions: Mapping[int, int], checked_ms: float, *, query_time_ms: float) -> bytes:
        """The same as ``stamped`` gives of a cached answer. ``positions`` must not be changed afterwards."""
        found = self._encoded.get(id(positions))
        if found is None:
            if len(self._encoded) >= _ENCODED:
                self._encoded.clear()
            found = self._encoded[id(positions)] = (positions, _positions(positions))
        return _joined(body, query_time_ms, b"true", found[1], checked_ms)


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


def _result(candidate: Candidate, chunk: StoredChunk, include_metadata: bool) -> Result:  # noqa: FBT001 - private, one caller
    return Result(
        text=chunk.text,
        score=candidate.score,
        document_id=chunk.document_id,
        version=chunk.version,
        title=chunk.title,
        source=chunk.source,
        heading_path=chunk.heading_path,
        span=(chunk.start, chunk.end),
        metadata=dict(chunk.metadata) if include_metadata else None,
    )
