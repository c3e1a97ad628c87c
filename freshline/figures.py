"""Summaries of measured values, always with their spread."""

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median, 95th and 99th percentile, and maximum."""
    ordered = sorted(values)
    p95, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.95, 0.99))
    figures = {"min": ordered[0], "p50": statistics.median(ordered), "p95": p95, "p99": p99, "max": ordered[-1]}
    return {name: round(figure, 1) for name, figure in figures.items()}


def extremes(values: Sequence[float], *, digits: int) -> dict[str, float]:
    """Minimum, median and maximum, for few values."""
    figures = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, digits) for name, value in figures.items()}
