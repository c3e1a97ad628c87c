"""More questions than can be answered: what is still answered, how quickly, and how soon all is well again."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import psutil

from bench.loaded import Ground, loaded
from bench.misses import new_questions
from freshline.loadtest.drive import arrivals_ask, straining, users_ask
from freshline.loadtest.lines import Target
from freshline.loadtest.questions import read_questions
from freshline.loadtest.tally import Tally
from freshline.services import query_target

_IN_FLIGHT: Final = 64
_CONNECTIONS: Final = 2_000
_AFTER_S: Final = 10
_AFTER_SHARE: Final = 0.5
_WELL_MS: Final = 1_000.0


async def bench_overload(
    ground: Ground,
    questions: Path,
    *,
    times: float,
    seconds: float,
    warm_s: float,
) -> dict[str, Any]:
    """Find what the service answers at most of what nobody has asked before; then ask several times as much.

    Args:
        ground: of whose history the last state is searched.
        questions: what is asked.
        times: how many times its capacity is asked.
        seconds: for how long; the capacity is measured for a quarter of that.
        warm_s: for so long it is asked before: servers that were just started compile themselves while they work, and a
            capacity of before that would be small.

    Raises:
        BenchmarkFailed: the installation did not start.
    """
    asked = read_questions(questions)
    async with loaded(ground, "last") as installation:
        process = psutil.Process(installation.pids["serve query"])
        target = query_target(installation.settings)
        new = new_questions(target, asked)
        return await overload(
            target,
            partial(next, new),
            times=times,
            seconds=seconds,
            warm_s=warm_s,
            rss_bytes=lambda: sum(one.memory_info().rss for one in (process, *process.children(recursive=True))),
            say=ground.say,
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
) -> dict[str, Any]:
    """Capacity, overload and the time after, of one target.

    Args:
        target: the service.
        ask: makes requests for what is not cached.
        times: how many times its capacity is asked.
        seconds: see ``bench_overload``.
        warm_s: see there.
        rss_bytes: memory of the service's process.
        say: told of progress.
    """
    say("warm-up", f"for {warm_s:g} s")
    await users_ask(target, ask, Tally().note_other, users=_IN_FLIGHT, think_s=0, seconds=warm_s)
    say("capacity", f"{_IN_FLIGHT} at a time")
    peak = Tally()
    await users_ask(target, ask, peak.note, users=_IN_FLIGHT, think_s=0, seconds=seconds / 4)
    capacity_per_s = peak.figures(seconds / 4)["answers_per_s"]
    say("overload", f"{times:g} times {capacity_per_s} in a second")
    before_bytes = rss_bytes()
    over = Tally()
    rate_per_s = max(1.0, times * capacity_per_s)
    async with straining() as strain:
        await arrivals_ask(target, ask, over.note, rate_per_s=rate_per_s, seconds=seconds, connections=_CONNECTIONS)
    over_figures = over.figures(seconds)
    grown_bytes = rss_bytes() - before_bytes
    say("after", f"{_AFTER_SHARE:g} times that")
    after = Tally()
    await arrivals_ask(
        target,
        ask,
        after.note,
        rate_per_s=max(1.0, _AFTER_SHARE * capacity_per_s),
        seconds=_AFTER_S,
        connections=_CONNECTIONS,
    )
    return {
        "times_capacity": times,
        "capacity_per_s": capacity_per_s,
        "goodput_share": round(over_figures["answers_per_s"] / max(capacity_per_s, 0.1), 3),
        "admitted_p99_ms": over_figures["p99_ms"],
        "recovered_after_s": _recovered_after_s(after),
        "grown_bytes": grown_bytes,
        "overload": over_figures,
        "after": after.figures(_AFTER_S),
        "generator": strain.figures(),
    }


def _recovered_after_s(after: Tally) -> int | None:
    """Seconds from which on everything was answered quickly; None where that never was."""
    well_from = 0 if after.last_refused_s is None else int(after.last_refused_s) + 1
    if not after.answered:
        return None
    for second in range(_AFTER_S - 1, well_from - 1, -1):
        p99_ms = after.times_between(second, second + 1)["p99_ms"]
        if p99_ms is not None and p99_ms > _WELL_MS:
            well_from = second + 1
            break
    return well_from if well_from < _AFTER_S else None
