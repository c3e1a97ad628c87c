"""Behaviour under overload: goodput, latency, and time to recover."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, TypedDict

import psutil

from bench.misses import new_questions
from bench.preloaded import BenchmarkSetup, preloaded
from freshline.loadtest.connection import Target
from freshline.loadtest.generator import measure_generator, run_arrivals, run_users
from freshline.loadtest.load_statistics import LoadStatistics
from freshline.loadtest.questions import read_questions
from freshline.services import query_target

_IN_FLIGHT: Final = 64
_CONNECTIONS: Final = 2_000
_AFTER_S: Final = 10
_AFTER_LOAD: Final = 0.5
_RECOVERED_P99_MS: Final = 1_000.0


class OverloadResults(TypedDict):
    """Results of an overload.

    Attributes:
        times_capacity: offered load as a multiple of the capacity.
        capacity_per_s: responses per second at capacity.
        capacity_p99_ms: 99th percentile of their latency; None without any.
        goodput_ratio: responses per second during the overload, as a ratio of the capacity.
        admitted_p99_ms: 99th percentile of the latency of admitted requests; None without any.
        recovery_s: seconds from which on all requests were answered quickly; None if never.
        memory_growth_bytes: growth of the resident memory during the overload.
        overload: load statistics during the overload.
        after: load statistics after it.
        generator: load of the generator itself.
    """

    times_capacity: float
    capacity_per_s: float
    capacity_p99_ms: float | None
    goodput_ratio: float
    admitted_p99_ms: float | None
    recovery_s: int | None
    memory_growth_bytes: int
    overload: dict[str, Any]
    after: dict[str, Any]
    generator: dict[str, float]


async def bench_overload(
    setup: BenchmarkSetup,
    questions: Path,
    *,
    times: float,
    seconds: float,
    warm_s: float,
) -> OverloadResults:
    """Measure the capacity for cache misses, then offer a multiple of it.

    Args:
        setup: the final state of its history is searched.
        questions: questions to ask.
        times: offered load as a multiple of the capacity.
        seconds: duration of the overload. The capacity is measured for a quarter of it.
        warm_s: warm-up time: newly started servers compile their code while they work, so their capacity is lower.

    Raises:
        BenchmarkFailed: the installation did not start.
    """
    asked = read_questions(questions)
    async with preloaded(setup, "final") as installation:
        process = psutil.Process(installation.pids["serve query"])
        target = query_target(installation.settings)
        uncached = new_questions(target, asked)
        return await overload(
            target,
            partial(next, uncached),
            times=times,
            seconds=seconds,
            warm_s=warm_s,
            rss_bytes=lambda: sum(one.memory_info().rss for one in (process, *process.children(recursive=True))),
            say=setup.say,
        )


async def overload(
    target: Target,
    ask: Callable[[], bytes],
    *,
    times: float,
    seconds: float,
    warm_s: float,
    rss_bytes: Callable[[], int],
    say: Callable[[str, str], None],
) -> OverloadResults:
    """Measure capacity, overload and recovery of a target.

    Args:
        target: the service.
        ask: returns requests for answers that are not cached.
        times: offered load as a multiple of the capacity.
        seconds: see ``bench_overload``.
        warm_s: see ``bench_overload``.
        rss_bytes: resident memory of the service.
        say: reports progress.
    """
    say("warm-up", f"for {warm_s:g} s")
    await run_users(target, ask, LoadStatistics().record_unparsed, users=_IN_FLIGHT, think_s=0, seconds=warm_s)
    say("capacity", f"{_IN_FLIGHT} in flight")
    peak = LoadStatistics()
    await run_users(target, ask, peak.record, users=_IN_FLIGHT, think_s=0, seconds=seconds / 4)
    peak_figures = peak.figures(seconds / 4)
    capacity_per_s = peak_figures["answers_per_s"]
    say("overload", f"{times:g} times {capacity_per_s} per second")
    before_bytes = rss_bytes()
    over = LoadStatistics()
    rate_per_s = max(1.0, times * capacity_per_s)
    async with measure_generator() as generator_load:
        await run_arrivals(target, ask, over.record, rate_per_s=rate_per_s, seconds=seconds, connections=_CONNECTIONS)
    over_figures = over.figures(seconds)
    memory_growth_bytes = rss_bytes() - before_bytes
    say("recovery", f"{_AFTER_LOAD:g} times the capacity")
    after = LoadStatistics()
    await run_arrivals(
        target,
        ask,
        after.record,
        rate_per_s=max(1.0, _AFTER_LOAD * capacity_per_s),
        seconds=_AFTER_S,
        connections=_CONNECTIONS,
    )
    return {
        "times_capacity": times,
        "capacity_per_s": capacity_per_s,
        "capacity_p99_ms": peak_figures["p99_ms"],
        "goodput_ratio": round(over_figures["answers_per_s"] / max(capacity_per_s, 0.1), 3),
        "admitted_p99_ms": over_figures["p99_ms"],
        "recovery_s": _recovery_s(after),
        "memory_growth_bytes": memory_growth_bytes,
        "overload": over_figures,
        "after": after.figures(_AFTER_S),
        "generator": generator_load.figures(),
    }


def _recovery_s(after: LoadStatistics) -> int | None:
    """Seconds after the overload from which on all requests were answered quickly; None if never."""
    recovered_from_s = 0 if after.last_rejected_s is None else int(after.last_rejected_s) + 1
    if not after.answered:
        return None
    for second in range(_AFTER_S - 1, recovered_from_s - 1, -1):
        p99_ms = after.latency_between(second, second + 1)["p99_ms"]
        if p99_ms is not None and p99_ms > _RECOVERED_P99_MS:
            recovered_from_s = second + 1
            break
    return recovered_from_s if recovered_from_s < _AFTER_S else None
