"""One load: users who ask while documents are edited."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import orjson

from freshline.loadtest.connection import Target
from freshline.loadtest.edits import EditSender
from freshline.loadtest.generator import measure_generator, run_users
from freshline.loadtest.load_statistics import LoadStatistics
from freshline.loadtest.questions import Zipf

MIN_SUCCESS_RATE: Final = 0.95
"""A load test ends after a step with a lower success rate."""


@dataclass(frozen=True, slots=True)
class UserLoad:
    """A closed-loop load.

    Attributes:
        users: concurrent users.
        think_s: mean of the exponentially distributed think time.
        seconds: duration.
        ramp_s: users start evenly over this time.
    """

    users: int
    think_s: float
    seconds: float
    ramp_s: float = 0.0


async def run_load(load: UserLoad, target: Target, questions: Zipf, statistics: LoadStatistics) -> dict[str, Any]:
    """Apply the load. Returns its figures."""
    async with measure_generator() as generator_load:
        await run_users(
            target,
            questions,
            statistics.record,
            users=load.users,
            think_s=load.think_s,
            seconds=load.seconds,
            ramp_s=load.ramp_s,
        )
    return {
        "users": load.users,
        "think_s": load.think_s,
        "ramp_s": load.ramp_s,
        **statistics.figures(load.seconds),
        "minutes": statistics.minutes(load.seconds),
        "generator": generator_load.figures(),
    }


async def run_steps(
    loads: Sequence[UserLoad],
    target: Target,
    questions: Zipf,
    *,
    new_statistics: Callable[[], LoadStatistics],
    on_step: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Apply loads in sequence; end after the first with a success rate below ``MIN_SUCCESS_RATE``.

    Args:
        loads: in their order.
        target: resource to request.
        questions: draws the requests.
        new_statistics: returns statistics for a load.
        on_step: called with the figures of each load.
    """
    steps = []
    for load in loads:
        figures = await run_load(load, target, questions, new_statistics())
        steps.append(figures)
        on_step(figures)
        if (figures["success_rate"] or 0.0) < MIN_SUCCESS_RATE:
            break
    return steps


@asynccontextmanager
async def editing(edits: EditSender | None) -> AsyncIterator[None]:
    """Send edits for the duration of the context."""
    if edits is None:
        yield
        return
    sending = asyncio.create_task(edits.run(), name="edits")
    try:
        yield
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


def question_requests(target: Target, questions: Sequence[str], *, top_k: int = 5) -> list[bytes]:
    """Encoded requests for these questions."""
    return [target.request(orjson.dumps({"query": question, "top_k": top_k})) for question in questions]
