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


class HealthScore(Message):
    """How well the process does."""

    score: int = Field(ge=0, le=100)
    reasons: tuple[str, ...] = Field(description="What it lost points for, most first.")


class PerformanceSummary(Message):
    """One process over the last seconds; replicas each have their own."""

    window_s: int
    requests: int
    requests_per_s: float
    times: TimesReport = Field(description="Of answered requests.")
    errors: dict[str, int] = Field(
        description="Requests by fault: `internal`, `unavailable` (a store or the generator), `limited`, `client`."
    )
    error_share: float = Field(description="Share of requests that ended with an internal error.")
    hit_share: float | None = Field(description="Share of answers from the cache; absent where there were none.")
    staleness: TimesReport = Field(description="How long before its answer went out `as_of` was read.")
    health: HealthScore
