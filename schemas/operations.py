"""What a service tells of how it does."""

from pydantic import Field

from schemas.models import Message


class HealthReport(Message):
    """Whether the process itself is well; stores are not its fault, and restarting it does not mend them."""

    status: str = Field(description="`ok`, or `failing` with status 503.")
    uptime_s: float
    memory_bytes: int = Field(description="Resident memory of the process.")
    memory_limit_bytes: int | None = Field(description="Beyond it the process is failing.")
    error_share: float = Field(description="Share of the last minute's requests that ended with an internal error.")


class ReadyReport(Message):
    """Whether questions can be answered now."""

    status: str = Field(description="`ready`, `degraded` (slower), or `unavailable` with status 503.")
    parts: dict[str, str] = Field(description="Part → `ready`, or what is wrong with it.")


class TimesReport(Message):
    """Milliseconds; all zero where there was nothing to time."""

    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


class AuditReport(Message):
    """What a second look at some of the answers from the cache found."""

    verdicts: dict[str, int] = Field(
        description="`same`; `drift`: unchanged passages rank otherwise; `newer`: lacked a change that `as_of` does "
        "not claim; `violation`: lacked one that it claims; `gone`: no longer there to be compared."
    )
    unsafe_share: float | None = Field(
        description="Share of violations among those that could be compared; absent where there were none."
    )
    past_objective: int = Field(description="Lacked a change that had been searchable for longer than a second.")
    stale: TimesReport = Field(description="For how long it had been searchable, of those that lacked one.")


class HealthScore(Message):
    """How well the process does."""

    score: int = Field(ge=0, le=100)
    reasons: tuple[str, ...] = Field(description="What it lost points for, most first.")


class PerformanceSummary(Message):
    """The processes that serve one address, over the last seconds; those of other addresses have their own."""

    window_s: int
    processes: int = Field(description="Whose requests these are.")
    requests: int
    requests_per_s: float
    times: TimesReport = Field(description="Of answered requests.")
    errors: dict[str, int] = Field(
        description="Requests by fault: `internal`, `unavailable` (a store or the generator), `limited`, `client`."
    )
    error_share: float = Field(description="Share of requests that ended with an internal error.")
    hit_share: float | None = Field(description="Share of answers from the cache; absent where there were none.")
    staleness: TimesReport = Field(description="How long before its answer went out `as_of` was read.")
    audit: AuditReport = Field(description="Of answers from the cache.")
    health: HealthScore
