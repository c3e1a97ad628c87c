"""What is told of a cached answer to those who run the service."""

from pydantic import Field

from schemas.models import Message
from schemas.positions import AsOf, PositionText


class SourceReport(Message):
    """A passage that an answer stands on."""

    document_id: str
    chunk_id: str
    version: int = Field(description="Document version that wrote the passage.")


class WindowReport(Message):
    """What one leg found at the fill, as far as it is kept."""

    places: int = Field(description="Kept.")
    asked: int = Field(description="Asked for; fewer were found where there were no more.")
    fused: int = Field(description="Of those kept, the first that fusion looked at.")
    fused_edge_score: float | None = Field(
        description="Score of the last that was fused; absent in the lexical leg, whose scores move with the index."
    )
    edge_score: float | None = Field(description="Score of the last that is kept; absent as above.")


class StoredReport(Message):
    """An answer as it lies in Redis."""

    filled_ms: float = Field(description="Epoch milliseconds.")
    filled_at: dict[int, int] = Field(description="Partition → offset known to be reflected when it was filled.")
    ends_in_ms: int = Field(description="Until it ends by itself.")
    size_bytes: int
    sources: tuple[SourceReport, ...] = Field(description="Best first.")
    vector_window: WindowReport
    lexical_window: WindowReport


class DropEvent(Message):
    """An event that an answer was judged by; what is absent is no longer known."""

    event_id: str
    document_id: str | None
    version: int | None
    position: PositionText | None
    searchable_ms: float | None = Field(description="Epoch milliseconds.")


class DropReport(Message):
    """A time at which the answer was dropped, or would have been, as all of its slice were."""

    at_ms: int = Field(description="Epoch milliseconds.")
    everything: bool = Field(description="All answers of the slice were dropped.")
    unjudged: str | None = Field(description="Why it was dropped without being judged, where that was told.")
    documents: tuple[str, ...] = Field(description="Changed by the events, the first of them where they are many.")
    events: tuple[DropEvent, ...] = Field(
        description="Judged together, the latest where they are many; not each of them need have altered the answer."
    )


class CacheExplanation(Message):
    """What is known of the cached answer to a question."""

    key: str
    tenant: str
    slice: int
    as_of: AsOf = Field(description="What the answers of its slice are true for.")
    left_aside: bool = Field(description="The tenant's answers are not served now: invalidation is behind.")
    near: bool = Field(description="The process that was asked would serve a copy of its own.")
    stored: StoredReport | None = Field(description="Absent where it is not cached.")
    drops: tuple[DropReport, ...] = Field(description="Newest first, as far as they are remembered.")
