"""Reports of health, readiness and performance."""

from pydantic import Field

from schemas.models import Message


class HealthReport(Message):
    """Health of the process itself. Dependencies are not included: a restart would not repair them."""

    status: str = Field(description="`ok`, or `failing` with status 503.")
    uptime_s: float
    memory_bytes: int = Field(description="Resident memory of the process.")
    memory_limit_bytes: int | None = Field(description="Memory above it fails the health check.")
    error_rate: float = Field(description="Fraction of requests of the last minute with an internal error.")


class ReadyReport(Message):
    """Whether questions can be answered now."""

    status: str = Field(description="`ready`, `degraded` (lower performance), or `unavailable` with status 503.")
    dependencies: dict[str, str] = Field(description="Dependency → `ready`, or a description of its failure.")


class TimesReport(Message):
    """Mean and percentiles in milliseconds; all zero if nothing was recorded."""

    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


class AuditReport(Message):
    """Audits of a sample of cache hits."""

    verdicts: dict[str, int] = Field(
        description="`same`; `drift`: unchanged passages rank differently; `newer`: lacked a change that `as_of` "
        "does not cover; `violation`: lacked a change that it covers; `gone`: no longer stored, not comparable."
    )
    violation_rate: float | None = Field(
        description="Fraction of violations among the hits that could be compared; null without any."
    )
    slo_violations: int = Field(description="Hits that lacked a change searchable for longer than one second.")
    staleness: TimesReport = Field(
        description="Time for which the missing change had been searchable, of hits that lacked one."
    )


class HealthScore(Message):
    """Health score."""

    score: int = Field(ge=0, le=100)
    reasons: tuple[str, ...] = Field(description="Reasons for lost points, largest penalty first.")


class PerformanceSummary(Message):
    """Performance of all processes that serve the address, over a window."""

    window_s: int
    processes: int = Field(description="Number of processes included.")
    requests: int
    requests_per_s: float
    times: TimesReport = Field(description="Latency of answered requests.")
    errors: dict[str, int] = Field(
        description="Failed requests: `internal`, `unavailable` (overload or a dependency), `limited`, `client`."
    )
    error_rate: float = Field(description="Fraction of requests with an internal error.")
    cache_hit_rate: float | None = Field(description="Fraction of answers from the cache; null without answers.")
    staleness: TimesReport = Field(description="Time from the read of `as_of` to the response.")
    audit: AuditReport = Field(description="Audited cache hits.")
    health: HealthScore
