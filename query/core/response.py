"""The response body: results that stay the same while they are cached, stamped anew for each caller."""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from infra.generation.port import GeneratedAnswer
from query.core.fusion import Candidate
from schemas.index import StoredChunk
from schemas.positions import AsOf
from schemas.queries import Result, Unanswered


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
    positions: Mapping[str, int] = {str(partition): offset for partition, offset in as_of.positions.items()}
    stamp = orjson.dumps(
        {
            "query_time_ms": round(query_time_ms, 3),
            "cached": cached,
            "as_of": {"positions": positions, "checked_ms": as_of.checked_ms},
        }
    )
    return b"".join((body[:-1], b",", stamp[1:]))


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
