"""One load: users who ask, edits that come meanwhile, and what came of both."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import orjson

from freshline.loadtest.drive import straining, users_ask
from freshline.loadtest.edits import Edits
from freshline.loadtest.lines import Target
from freshline.loadtest.questions import Zipf
from freshline.loadtest.tally import Tally

LEAST_SUCCESS: Final = 0.95
"""Where fewer requests succeed, more users would show nothing new."""


@dataclass(frozen=True, slots=True)
class Crowd:
    """Who asks, and how.

    Attributes:
        users: at a time.
        think_s: mean of the time that each thinks, exponentially distributed.
        seconds: how long.
        ramp_s: they come evenly over this time.
    """

    users: int
    think_s: float
    seconds: float
    ramp_s: float = 0.0


async def ask_as(crowd: Crowd, target: Target, questions: Zipf, tally: Tally) -> dict[str, Any]:
    """Let the crowd ask; what came of it."""
    async with straining() as strain:
        await users_ask(
            target,
            questions,
            tally.note,
            users=crowd.users,
            think_s=crowd.think_s,
            seconds=crowd.seconds,
            ramp_s=crowd.ramp_s,
        )
    return {
        "users": crowd.users,
        "think_s": crowd.think_s,
        "ramp_s": crowd.ramp_s,
        **tally.figures(crowd.seconds),
        "minutes": tally.minutes(crowd.seconds),
        "generator": strain.figures(),
    }


async def climb(
    crowds: Sequence[Crowd],
    target: Target,
    questions: Zipf,
    *,
    new_tally: Callable[[], Tally],
    told: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """One crowd after the other; ends after the first that too many requests of failed.

    Args:
        crowds: in their order.
        target: where they ask.
        questions: what they ask.
        new_tally: counts for one crowd.
        told: called with the figures of each.
    """
    steps = []
    for crowd in crowds:
        figures = await ask_as(crowd, target, questions, new_tally())
        steps.append(figures)
        told(figures)
        if (figures["success_share"] or 0.0) < LEAST_SUCCESS:
            break
    return steps


@asynccontextmanager
async def editing(edits: Edits | None) -> AsyncIterator[None]:
    """Edits are sent while the context lasts."""
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
    """Requests for these questions, ready to be sent."""
    return [target.request(orjson.dumps({"query": question, "top_k": top_k})) for question in questions]
