"""Answers out of the cache over thousands of connections, beside the least that could be done, and the usual way.

All three answer the same questions with the same bytes, one after the other in the same run, on the same cores as wrk.
"""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import httpx
import orjson

from bench.beside import beside
from bench.installation import cpu_s
from bench.loaded import Ground, loaded
from freshline.loadtest.lines import Target
from freshline.loadtest.questions import read_questions
from freshline.loadtest.wrk import wrk
from freshline.services import query_target

_WARM_UP_S: Final = 3.0


async def bench_hits(
    ground: Ground,
    questions: Path,
    *,
    distinct: int,
    connections: int,
    seconds: float,
) -> dict[str, Any]:
    """Fill the cache with some questions, then ask them as fast as wrk can.

    Args:
        ground: of whose history the last state is searched.
        questions: what is asked, under Zipf's skew with s = 1.
        distinct: how many of them.
        connections: at a time.
        seconds: for each of the three.

    Raises:
        BenchmarkFailed: the installation or a baseline did not start.
        NoWrk: see there.
    """
    bodies = [orjson.dumps({"query": question}) for question in read_questions(questions)[:distinct]]
    async with AsyncExitStack() as ending:
        installation = await ending.enter_async_context(loaded(ground, "last"))
        ours = query_target(installation.settings)
        ground.say("cache", f"{len(bodies)} questions")
        answers = await _filled(ours, bodies)
        file = installation.home / "answers.jsonl"
        lines = [orjson.dumps([body.decode(), answer.decode()]) for body, answer in answers.items()]
        await asyncio.to_thread(file.write_bytes, b"\n".join(lines))
        targets = {"ours": (ours, installation.pids["serve query"])}
        for kind in ("bare", "usual"):
            targets[kind] = await ending.enter_async_context(beside(kind, installation, file))
        found = {}
        for kind in ("bare", "usual", "ours"):
            ground.say("hits", kind)
            target, pid = targets[kind]
            weighted = [(1 / rank, target.request(body)) for rank, body in enumerate(bodies, start=1)]
            await wrk(target, weighted, connections=connections, seconds=_WARM_UP_S)
            used_s = cpu_s(pid)
            figures = await wrk(target, weighted, connections=connections, seconds=seconds)
            cpu_us = (cpu_s(pid) - used_s) * 1e6 / max(1, figures["requests"])
            found[kind] = {**figures, "cpu_us_each": round(cpu_us, 1)}
    return {
        "connections": connections,
        "seconds": seconds,
        "questions": len(bodies),
        "mean_answer_bytes": round(sum(map(len, answers.values())) / len(answers)),
        **found,
        "ratio_to_bare": _ratio(found, "bare"),
        "ratio_to_usual": _ratio(found, "usual"),
    }


def _ratio(found: Mapping[str, Mapping[str, Any]], other: str) -> float:
    return round(float(found["ours"]["answers_per_s"] / max(found[other]["answers_per_s"], 0.1)), 3)


async def _filled(target: Target, bodies: list[bytes]) -> dict[bytes, bytes]:
    """Each question with its answer as it comes from the cache."""
    answers = {}
    headers = {"Content-Type": "application/json", **target.headers}
    async with httpx.AsyncClient(timeout=60, headers=headers) as client:
        for body in bodies:
            for _ in range(2):
                response = await client.post(target.url, content=body)
                response.raise_for_status()
            answers[body] = response.content
    return answers
