"""Explanations of cached answers, for operators."""

from pydantic import Field

from schemas.models import Message
from schemas.positions import AsOf, PositionText


class SourceReport(Message):
    """A source of an answer."""

    document_id: str
    chunk_id: str
    version: int = Field(description="Document version that wrote the passage.")


class CandidatesReport(Message):
    """Candidates of one retriever at the fill."""

    kept: int = Field(description="Candidates kept with the answer.")
    requested: int = Field(description="Candidates requested. More than kept if the index had no more.")
    fused: int = Field(description="Highest-ranked candidates that were fused.")
    lowest_fused_score: float | None = Field(
        description="Score of the last fused candidate; null for lexical scores, which depend on the whole index."
    )
    lowest_kept_score: float | None = Field(description="Score of the last kept candidate; null as above.")


class StoredReport(Message):
    """An answer as stored in Redis."""

    filled_ms: float = Field(description="Epoch milliseconds.")
    filled_at: dict[int, int] = Field(description="Partition → offset known to be reflected when it was filled.")
    ttl_ms: int = Field(description="Remaining time to live.")
    size_bytes: int
    sources: tuple[SourceReport, ...] = Field(description="Best first.")
    vector_candidates: CandidatesReport
    lexical_candidates: CandidatesReport


class DropEvent(Message):
    """An event that invalidated an answer. Fields are null if its status has expired."""

    event_id: str
    document_id: str | None
    version: int | None
    position: PositionText | None
    searchable_ms: float | None = Field(description="Epoch milliseconds.")


class DropReport(Message):
    """An invalidation of the answer, or of its whole slice."""

    at_ms: int = Field(description="Epoch milliseconds.")
    everything: bool = Field(description="All answers of the slice were invalidated.")
    not_evaluated: str | None = Field(description="Why it was invalidated without evaluation, if recorded.")
    documents: tuple[str, ...] = Field(description="Documents changed by the events; the first ones if there are many.")
    events: tuple[DropEvent, ...] = Field(
        description="Events that were evaluated together; the latest ones if there are many. Not all of them altered "
        "the answer."
    )


class CacheExplanation(Message):
    """What is cached for a question."""

    key: str
    tenant: str
    slice: int
    as_of: AsOf = Field(description="Positions that the answers of the slice reflect.")
    bypassed: bool = Field(description="True if the tenant bypasses the cache because invalidation lags.")
    near: bool = Field(description="True if the near cache of this process would serve it.")
    stored: StoredReport | None = Field(description="Null if it is not cached.")
    drops: tuple[DropReport, ...] = Field(description="Recent invalidations, newest first.")
