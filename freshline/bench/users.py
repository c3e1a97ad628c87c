"""Thousands of users who think between their questions, while documents change."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from freshline.bench.loaded import Ground, edits_of, empty_cache, loaded
from freshline.load.questions import Zipf, read_questions
from freshline.load.run import Crowd, ask_as, editing, question_requests
from freshline.load.tally import Ledger, Tally
from freshline.services import query_target


async def bench_users(
    ground: Ground,
    questions: Path,
    *,
    users: Sequence[int],
    think_s: float,
    minutes: float,
    ramp_s: float,
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
            found.append({"questions": len(asked), "skew": skew, **figures, **sent, "cpu_s": cpu_s})
    return found
