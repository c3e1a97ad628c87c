"""Health score of a process, with reasons. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from query.telemetry.audit_verdicts import AuditVerdict
from query.telemetry.rolling_stats import WindowStats

MAX_ERROR_RATE: Final = 0.05
"""Fraction of requests with an internal error from which the process is unhealthy."""

P99_OBJECTIVE_MS: Final = 1_000.0

_REQUIRED_PENALTY: Final = 50.0
_OPTIONAL_PENALTY: Final = 10.0
_ERROR_PENALTY: Final = 40.0
_REJECTION_PENALTY: Final = 30.0
_LATENCY_PENALTY: Final = 20.0
_VIOLATION_PENALTY: Final = 40.0
_MIN_REQUESTS: Final = 20
"""Rates and percentiles of a window with fewer requests are not evaluated."""


@dataclass(frozen=True, slots=True)
class DependencyState:
    """State of a dependency.

    Attributes:
        required: False if questions are answered without it, at lower performance.
        fault: description of the failure; None if it is available.
    """

    required: bool
    fault: str | None


@dataclass(frozen=True, slots=True)
class Health:
    """Health score from 0 to 100, and the reasons for lost points, largest penalty first."""

    score: int
    reasons: tuple[str, ...]


def health(window: WindowStats, dependencies: Mapping[str, DependencyState]) -> Health:
    """Score a window and the dependencies.

    Penalties: 50 for each required dependency that is unavailable, 10 for each optional one; up to 40 for internal
    errors, reached at twice ``MAX_ERROR_RATE``; up to 30 for rejections, reached when all requests are rejected; up to
    20 for a p99 above the objective, reached at twice the objective; 40 for any audited freshness violation.
    """
    penalties = [
        (_REQUIRED_PENALTY if state.required else _OPTIONAL_PENALTY, f"{name}: {state.fault}")
        for name, state in dependencies.items()
        if state.fault is not None
    ]
    violations = window.audits[AuditVerdict.VIOLATION]
    if violations:
        penalties.append(
            (_VIOLATION_PENALTY, f"{violations} audited answers lacked changes that their positions cover")
        )
    if window.requests >= _MIN_REQUESTS:
        p99_ms = window.latency.p99_ms
        penalties += [
            (
                _ERROR_PENALTY * min(1.0, window.error_rate / (2 * MAX_ERROR_RATE)),
                f"{window.error_rate:.1%} of requests failed",
            ),
            (
                _REJECTION_PENALTY * window.rejection_rate,
                f"{window.rejection_rate:.1%} of requests were rejected",
            ),
            (
                _LATENCY_PENALTY * min(1.0, max(0.0, p99_ms / P99_OBJECTIVE_MS - 1)),
                f"p99 latency is {p99_ms:.0f} ms, objective {P99_OBJECTIVE_MS:.0f} ms",
            ),
        ]
    penalties = sorted((penalty for penalty in penalties if penalty[0] > 0), key=lambda penalty: -penalty[0])
    score = max(0, round(100 - sum(points for points, _ in penalties)))
    return Health(score, tuple(reason for _, reason in penalties))


def is_healthy(window: WindowStats) -> bool:
    """False if the rate of internal errors suggests a restart of the process."""
    return window.requests < _MIN_REQUESTS or window.error_rate < MAX_ERROR_RATE
