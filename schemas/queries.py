"""Queries and answers."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field, StringConstraints, field_validator

from schemas.documents import IndexedMetadata, MetadataValue
from schemas.models import Message, Request
from schemas.positions import AsOf, PositionText

MAX_QUERY_CHARS: Final = 2_000
MAX_TOP_K: Final = 50
MAX_FILTERS: Final = 16

FILTER_FIELDS: Final = ("document_id", "source", "title")
"""Fields that can be filtered, besides ``metadata.NAME``."""


class QueryRequest(Request):
    """A query."""

    query: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_QUERY_CHARS)]
    top_k: int = Field(default=5, ge=1, le=MAX_TOP_K)
    include_metadata: bool = True
    filters: dict[str, MetadataValue | tuple[MetadataValue, ...]] | None = Field(
        default=None,
        max_length=MAX_FILTERS,
        description="Exact matches, all required. A list matches any of its values. "
        f"Fields: {', '.join(FILTER_FIELDS)}, metadata.NAME.",
    )
    min_position: PositionText | None = Field(
        default=None, description="Answer only from a state that reflects this position. Waits for it, bounded."
    )
    generate: bool = Field(default=False, description="Generate an answer from the results, with citations.")

    @field_validator("filters")
    @classmethod
    def _known_fields(cls, filters: dict[str, object] | None) -> dict[str, object] | None:
        for name in filters or ():
            if name not in FILTER_FIELDS and not (name.startswith("metadata.") and len(name) > len("metadata.")):
                raise ValueError(f"cannot filter by {name!r}: use {', '.join(FILTER_FIELDS)} or metadata.NAME")
        return filters


class Result(Message):
    """A retrieved passage.

    ``version`` is the document version that last changed this passage; ``span`` is its range in the text of that
    version. Both stay valid while later versions do not change the passage.
    """

    text: str
    score: float
    document_id: str
    version: int
    title: str | None
    source: str | None
    heading_path: tuple[str, ...]
    span: tuple[int, int]
    metadata: IndexedMetadata | None = None


class Citation(Message):
    """A citation of a result in the answer."""

    source: int = Field(description="Number of the result, from 1.")
    quote: str


class Unanswered(StrEnum):
    """Why a requested answer was not generated."""

    BUSY = "busy"
    FAILED = "failed"
    LIMITED = "limited"


class QueryResponse(Message):
    """An answer with the stream positions that it reflects."""

    results: tuple[Result, ...]
    answer: str | None = None
    citations: tuple[Citation, ...] | None = None
    unanswered: Unanswered | None = Field(
        default=None,
        description="Set if a requested answer was not generated: the generator is busy or failed, or the tenant "
        "has exhausted its token budget. The results are valid.",
    )
    query_time_ms: float
    cached: bool
    as_of: AsOf


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """A generated answer in Markdown.

    ``[n]`` in ``text`` refers to source ``n``. ``citations`` has each citation with a verbatim quote of the source.
    """

    text: str
    citations: tuple[Citation, ...] = ()
