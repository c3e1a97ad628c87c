"""A closed loop of thousands of users with think time, while documents are edited.

Newly started servers take several times as long for a search until their code is compiled, and evaluators have not read
any passage yet. This is not a property of an empty cache, so a warm-up with other questions and edits precedes.
"""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench.preloaded import BenchmarkSetup, edits_of, empty_cache, preloaded
from freshline.loadtest.connection import Target
from freshline.loadtest.generator import run_users
from freshline.loadtest.load_statistics import FreshnessSlo, LoadStatistics
from freshline.loadtest.questions import Zipf, read_questions
from freshline.loadtest.run import UserLoad, editing, question_requests, run_load
from freshline.services import query_target

_WARM_USERS: Final = 16
_WARM_QUESTIONS: Final = 20_000


async def bench_users(
    setup: BenchmarkSetup,
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
    """Apply each number of users to an initially empty cache.

    Args:
        setup: the snapshot of its history is searched, and its edits are sent.
        questions: questions to ask.
        users: numbers of concurrent users, applied in sequence.
        think_s: mean think time.
        minutes: duration for each number of users.
        ramp_s: users start evenly over this time.
        warm_s: warm-up time, with edits and with questions that are not asked afterwards.
        skew: Zipf's s over the questions.
        edits_per_s: edits per second.

    Raises:
        BenchmarkFailed: the installation did not start.
        BadQuestionFile: the question file is invalid.
        BadEventFile: the history is invalid.
    """
    asked = read_questions(questions)
    figures_by_load: list[dict[str, Any]] = []
    async with preloaded(setup) as installation:
        target = query_target(installation.settings)
        requests = question_requests(target, asked)
        if warm_s:
            setup.say("users", f"servers warm up for {warm_s:g} s")
            async with edits_of(installation, setup.events, FreshnessSlo(), per_s=edits_per_s) as edits, editing(edits):
                await _warm_up(target, asked, warm_s)
        for number, crowd_size in enumerate(users):
            await empty_cache(installation)
            slo = FreshnessSlo()
            load = UserLoad(crowd_size, think_s, minutes * 60, ramp_s)
            setup.say("users", f"{crowd_size} for {minutes:g} minutes")
            used_s = installation.cpu_s()
            async with edits_of(installation, setup.events, slo, per_s=edits_per_s) as edits, editing(edits):
                figures = await run_load(load, target, Zipf(requests, skew=skew, seed=number), LoadStatistics(slo))
                sent = edits.figures() if edits is not None else {}
            cpu_s = {name: round(now_s - used_s[name], 1) for name, now_s in installation.cpu_s().items()}
            figures_by_load.append(
                {"questions": len(asked), "skew": skew, "warm_s": warm_s, **figures, **sent, "cpu_s": cpu_s}
            )
    return figures_by_load


async def _warm_up(target: Target, questions: Sequence[str], seconds: float) -> None:
    others = question_requests(target, other_questions(questions, _WARM_QUESTIONS))
    if others:
        ask = iter(itertools.cycle(others)).__next__
        await run_users(target, ask, lambda _: None, users=_WARM_USERS, think_s=0, seconds=seconds)


def other_questions(questions: Sequence[str], limit: int) -> list[str]:
    """Similar questions that are not among the given ones: each combines the halves of two."""
    rng = random.Random(limit)  # noqa: S311 - load, not secrets
    pairs = (rng.choices(questions, k=2) for _ in range(limit))
    asked = set(questions)
    mixed = (_mixed(first.split(), second.split()) for first, second in pairs)
    return [question for question in mixed if question not in asked]


def _mixed(first: Sequence[str], second: Sequence[str]) -> str:
    return " ".join([*first[: (len(first) + 1) // 2], *second[len(second) // 2 :]])
