"""How well a process does, as one number with its reasons. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from query.telemetry.audit_verdicts import Verdict
from query.telemetry.rolling_stats import Window

MAX_ERROR_SHARE: Final = 0.05
"""Share of requests that may end by faults of this process before it counts as unwell."""

P99_OBJECTIVE_MS: Final = 1_000.0

_NEEDED_PENALTY: Final = 50.0
_USEFUL_PENALTY: Final = 10.0
_ERROR_PENALTY: Final = 40.0
_UNAVAILABLE_PENALTY: Final = 30.0
_SLOW_PENALTY: Final = 20.0
_STALE_PENALTY: Final = 40.0
_FEWEST: Final = 20
"""Requests below which shares and percentiles say nothing."""


@dataclass(frozen=True, slots=True)
class PartState:
    """A part that answering depends on.

    Attributes:
        needed: False where questions are answered without it, only slower.
        fault: what is wrong; None where nothing is.
    """

    needed: bool
    fault: str | None


@dataclass(frozen=True, slots=True)
class Health:
    """The score, 0 to 100, and what it lost points for, most first."""

    score: int
    reasons: tuple[str, ...]


def health(window: Window, parts: Mapping[str, PartState]) -> Health:
    """Score a window and the parts.

    A part that is needed and out costs 50 points, another one 10. Own errors cost 40 at twice ``MAX_ERROR_SHARE``,
    refusals 30 if all requests are refused, a p99 beyond the objective 20 at twice that; below these, in proportion. An
    answer from the cache that lacked what it claimed costs 40, be it one.
    """
    lost = [
        (_NEEDED_PENALTY if part.needed else _USEFUL_PENALTY, f"{name}: {part.fault}")
        for name, part in parts.items()
        if part.fault is not None
    ]
    stale = window.audited[Verdict.VIOLATION]
    if stale:
        lost.append((_STALE_PENALTY, f"{stale} audited answers lacked changes that they claimed"))
    if window.requests >= _FEWEST:
        p99_ms = window.times.p99_ms
        lost += [
            (
                _ERROR_PENALTY * min(1.0, window.error_share / (2 * MAX_ERROR_SHARE)),
                f"{window.error_share:.1%} of requests failed",
            ),
            (
                _UNAVAILABLE_PENALTY * window.unavailable_share,
                f"{window.unavailable_share:.1%} of requests were refused",
            ),
            (
                _SLOW_PENALTY * min(1.0, max(0.0, p99_ms / P99_OBJECTIVE_MS - 1)),
                f"p99 is {p99_ms:.0f} ms, the objective {P99_OBJECTIVE_MS:.0f} ms",
            ),
        ]
    lost = sorted((one for one in lost if one[0] > 0), key=lambda one: -one[0])
    score = max(0, round(100 - sum(points for points, _ in lost)))
    return Health(score, tuple(reason for _, reason in lost))


def is_well(window: Window) -> bool:
    """False where so many requests end by faults of this process that another one may do better."""
    return window.requests < _FEWEST or window.error_share < MAX_ERROR_SHARE
