"""Thousands of users who think between their questions, while documents change.

Servers that were just started take several times as long for a search, until their machine code is compiled, and judges
have not read any passages. That is no property of an empty cache, so they answer other questions first, and edits come.
"""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench.loaded import Ground, edits_of, empty_cache, loaded
from freshline.loadtest.drive import users_ask
from freshline.loadtest.lines import Target
from freshline.loadtest.questions import Zipf, read_questions
from freshline.loadtest.run import Crowd, ask_as, editing, question_requests
from freshline.loadtest.tally import Ledger, Tally
from freshline.services import query_target

_WARM_USERS: Final = 16
_WARM_QUESTIONS: Final = 20_000


async def bench_users(
    ground: Ground,
    questions: Path,
    *,
    users: Sequence[int],
    think_s: float,
    minutes: float,
    ramp_s: float,
    warm_s: float,
    skew: float,
    edits_per_s: float,
) -> list[dict[str, Any]]:
    """For each number of users: an empty cache, then that many who ask.

    Args:
        ground: of whose history the snapshot is searched, and the edits are sent.
        questions: what is asked.
        users: how many at a time, one number after the other.
        think_s: mean of the time between an answer and the next question.
        minutes: of each number of users.
        ramp_s: the users come evenly over this time.
        warm_s: for so long, before the first of them, others ask what nobody asks afterwards, and edits come too.
        skew: Zipf's s over the questions.
        edits_per_s: edits in a second.

    Raises:
        BenchmarkFailed: the installation did not start.
        BadQuestionFile, BadEventFile: see there.
    """
    asked = read_questions(questions)
    found: list[dict[str, Any]] = []
    async with loaded(ground) as installation:
        target = query_target(installation.settings)
        requests = question_requests(target, asked)
        if warm_s:
            ground.say("users", f"servers warm up for {warm_s:g} s")
            async with edits_of(installation, ground.events, Ledger(), per_s=edits_per_s) as edits, editing(edits):
                await _warm_up(target, asked, warm_s)
        for number, crowd_size in enumerate(users):
            await empty_cache(installation)
            ledger = Ledger()
            crowd = Crowd(crowd_size, think_s, minutes * 60, ramp_s)
            ground.say("users", f"{crowd_size} ask for {minutes:g} minutes")
            used_s = installation.cpu_s()
            async with edits_of(installation, ground.events, ledger, per_s=edits_per_s) as edits, editing(edits):
                figures = await ask_as(crowd, target, Zipf(requests, skew=skew, seed=number), Tally(ledger))
                sent = edits.figures() if edits is not None else {}
            cpu_s = {name: round(now_s - used_s[name], 1) for name, now_s in installation.cpu_s().items()}
            found.append({"questions": len(asked), "skew": skew, "warm_s": warm_s, **figures, **sent, "cpu_s": cpu_s})
    return found


async def _warm_up(target: Target, questions: Sequence[str], seconds: float) -> None:
    others = question_requests(target, other_questions(questions, _WARM_QUESTIONS))
    if others:
        ask = iter(itertools.cycle(others)).__next__
        await users_ask(target, ask, lambda _: None, users=_WARM_USERS, think_s=0, seconds=seconds)


def other_questions(questions: Sequence[str], most: int) -> list[str]:
    """Questions like these, and none of them: each begins as one does, and ends as another."""
    chance = random.Random(most)  # noqa: S311 - load, not secrets
    pairs = (chance.choices(questions, k=2) for _ in range(most))
    known = set(questions)
    mixed = (_mixed(first.split(), second.split()) for first, second in pairs)
    return [question for question in mixed if question not in known]


def _mixed(first: Sequence[str], second: Sequence[str]) -> str:
    return " ".join([*first[: (len(first) + 1) // 2], *second[len(second) // 2 :]])
