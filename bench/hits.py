"""Cache hits over thousands of connections, compared with a bare ASGI application and a usual cache.

All three serve the same bytes for the same questions, in sequence, on the same cores as wrk.
"""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import httpx
import orjson

from bench.baseline_server import baseline_server
from bench.installation import cpu_s
from bench.preloaded import BenchmarkSetup, preloaded
from freshline.loadtest.connection import Target
from freshline.loadtest.questions import read_questions
from freshline.loadtest.wrk import wrk
from freshline.services import query_target

_WARM_UP_S: Final = 3.0


async def bench_hits(
    setup: BenchmarkSetup,
    questions: Path,
    *,
    distinct: int,
    connections: int,
    seconds: float,
) -> dict[str, Any]:
    """Fill the cache, then request the cached answers as fast as wrk can.

    Args:
        setup: the final state of its history is searched.
        questions: questions, drawn with Zipf's s = 1.
        distinct: number of questions.
        connections: concurrent connections.
        seconds: duration for each of the three servers.

    Raises:
        BenchmarkFailed: the installation or a baseline did not start.
        WrkUnavailable: wrk is not installed, or failed.
    """
    bodies = [orjson.dumps({"query": question}) for question in read_questions(questions)[:distinct]]
    async with AsyncExitStack() as ending:
        installation = await ending.enter_async_context(preloaded(setup, "final"))
        ours = query_target(installation.settings)
        setup.say("cache", f"{len(bodies)} questions")
        answers = await _filled(ours, bodies)
        file = installation.home / "answers.jsonl"
        lines = [orjson.dumps([body.decode(), answer.decode()]) for body, answer in answers.items()]
        await asyncio.to_thread(file.write_bytes, b"\n".join(lines))
        targets = {"ours": (ours, installation.pids["serve query"])}
        for kind in ("bare", "usual"):
            targets[kind] = await ending.enter_async_context(baseline_server(kind, installation, file))
        figures_by_kind = {}
        for kind in ("bare", "usual", "ours"):
            setup.say("hits", kind)
            target, pid = targets[kind]
            weighted = [(1 / rank, target.request(body)) for rank, body in enumerate(bodies, start=1)]
            await wrk(target, weighted, connections=connections, seconds=_WARM_UP_S)
            used_s = cpu_s(pid)
            figures = await wrk(target, weighted, connections=connections, seconds=seconds)
            cpu_us = (cpu_s(pid) - used_s) * 1e6 / max(1, figures["requests"])
            figures_by_kind[kind] = {**figures, "cpu_us_per_request": round(cpu_us, 1)}
    return {
        "connections": connections,
        "seconds": seconds,
        "questions": len(bodies),
        "mean_answer_bytes": round(sum(map(len, answers.values())) / len(answers)),
        **figures_by_kind,
        "ratio_to_bare": _ratio(figures_by_kind, "bare"),
        "ratio_to_usual": _ratio(figures_by_kind, "usual"),
    }


def _ratio(figures_by_kind: Mapping[str, Mapping[str, Any]], other: str) -> float:
    return round(float(figures_by_kind["ours"]["answers_per_s"] / max(figures_by_kind[other]["answers_per_s"], 0.1)), 3)


async def _filled(target: Target, bodies: list[bytes]) -> dict[bytes, bytes]:
    """Each request body with its response from the cache."""
    answers = {}
    headers = {"Content-Type": "application/json", **target.headers}
    async with httpx.AsyncClient(timeout=60, headers=headers) as client:
        for body in bodies:
            for _ in range(2):
                response = await client.post(target.url, content=body)
                response.raise_for_status()
            answers[body] = response.content
    return answers
