"""Cache misses, compared with the index alone and with a usual search service."""

import itertools
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from os import cpu_count
from pathlib import Path
from typing import Any, Final

import orjson

from bench.baseline_server import baseline_server
from bench.installation import BenchInstallation
from bench.preloaded import BenchmarkSetup, empty_cache, preloaded
from bench.searches import searches_of
from freshline.loadtest.connection import Target
from freshline.loadtest.generator import measure_generator, run_users
from freshline.loadtest.load_statistics import LoadStatistics
from freshline.loadtest.questions import read_questions
from freshline.services import query_target
from infra.embedding.factory import open_embedder
from infra.opensearch import codec
from infra.settings import Settings
from query.cache.key import normalised

IN_FLIGHT: Final = (1, 16, 64)
_BODIES: Final = 1_500
"""Searches of the index alone, sent repeatedly: the index does not cache results with hits."""

_NDJSON: Final = "application/x-ndjson"


async def bench_misses(
    setup: BenchmarkSetup,
    questions: Path,
    *,
    in_flight: Sequence[int],
    seconds: float,
    warm_s: float,
) -> dict[str, Any]:
    """For each number of requests in flight, measure the index alone, a usual search service, and the service.

    The service is measured in the middle, the others before and after it. The upper bound of the throughput is that at
    which index and model alone use all cores.

    Args:
        setup: the final state of its history is searched.
        questions: questions, each asked once, then again with a number appended.
        in_flight: numbers of concurrent requests.
        seconds: duration for each of the three.
        warm_s: warm-up time for each of the services.

    Raises:
        BenchmarkFailed: the installation or the baseline did not start.
    """
    asked = read_questions(questions)
    rows = []
    async with preloaded(setup, "final") as installation, baseline_server("vectors", installation) as (usual, _):
        target = query_target(installation.settings)
        new, usual_new = new_questions(target, asked), new_questions(usual, asked)
        index, searches = await _searches(installation, asked[:_BODIES])
        model_ms = await _model_ms(installation.settings, asked[:_BODIES])
        setup.say("warm-up", "newly started servers compile their code")
        for service, requests in ((target, new), (usual, usual_new)):
            record, ask = LoadStatistics().record_unparsed, partial(next, requests)
            await run_users(service, ask, record, users=max(in_flight), think_s=0, seconds=warm_s)
        for concurrency in in_flight:
            setup.say("misses", f"{concurrency} in flight")
            alone, bare = LoadStatistics(), LoadStatistics()
            ask_usual = partial(
                run_users, usual, partial(next, usual_new), bare.record_unparsed, users=concurrency, think_s=0
            )
            ask_index = partial(run_users, index, searches, alone.record_unparsed, users=concurrency, think_s=0)
            index_s = await _index_cpu_s(installation, ask_index(seconds=seconds / 2))
            await ask_usual(seconds=seconds / 2)
            await empty_cache(installation)
            used_s = installation.cpu_s()
            figures = await _drive(target, partial(next, new), concurrency, seconds)
            cpu_s = {name: now_s - used_s[name] for name, now_s in installation.cpu_s().items()}
            await ask_usual(seconds=seconds / 2)
            index_s += await _index_cpu_s(installation, ask_index(seconds=seconds / 2))
            alone_figures, usual_figures = alone.figures(seconds), bare.figures(seconds)
            index_ms = index_s * 1_000 / max(1, alone_figures["requests"])
            most_per_s = (cpu_count() or 1) * 1_000 / (index_ms + model_ms)
            rows.append(
                {
                    "in_flight": concurrency,
                    **figures,
                    "usual_service": usual_figures,
                    "ratio_to_usual": round(figures["answers_per_s"] / usual_figures["answers_per_s"], 3),
                    "p50_to_usual": round(figures["p50_ms"] / usual_figures["p50_ms"], 3),
                    "index_alone": alone_figures,
                    "ratio_to_index": round(figures["answers_per_s"] / alone_figures["answers_per_s"], 3),
                    "index_alone_cpu_ms": round(index_ms, 2),
                    "model_cpu_ms": round(model_ms, 2),
                    "max_answers_per_s": round(most_per_s, 1),
                    "ratio_to_max": round(figures["answers_per_s"] / most_per_s, 3),
                    "cpu_ms_per_request": {
                        name: round(used * 1_000 / max(1, figures["requests"]), 2) for name, used in cpu_s.items()
                    },
                }
            )
    return {"misses": rows}


async def _model_ms(settings: Settings, questions: Sequence[str]) -> float:
    """Processor time of the model per question."""
    embedder = open_embedder(settings.embedding)
    try:
        await embedder.embed_query(questions[0])
        began_s = time.process_time()
        for question in questions:
            await embedder.embed_query(normalised(question))
        return (time.process_time() - began_s) * 1_000 / len(questions)
    finally:
        await embedder.close()


async def _index_cpu_s(installation: BenchInstallation, work: Awaitable[object]) -> float:
    """Processor time of all index nodes during ``work``, in seconds."""

    def used_s() -> float:
        return sum(used for name, used in installation.cpu_s().items() if name.startswith("opensearch"))

    began_s = used_s()
    await work
    return used_s() - began_s


async def _drive(target: Target, ask: Callable[[], bytes], concurrency: int, seconds: float) -> dict[str, Any]:
    statistics = LoadStatistics()
    async with measure_generator() as generator_load:
        await run_users(target, ask, statistics.record, users=concurrency, think_s=0, seconds=seconds)
    return {**statistics.figures(seconds), "generator": generator_load.figures()}


def new_questions(target: Target, asked: Sequence[str]) -> Iterator[bytes]:
    """Endless requests for distinct questions: the given ones, then the same with a number appended."""
    for round_number in itertools.count():
        for question in asked:
            text = f"{question} {round_number}" if round_number else question
            yield target.request(orjson.dumps({"query": text}))


async def _searches(installation: BenchInstallation, asked: Sequence[str]) -> tuple[Target, Callable[[], bytes]]:
    """The searches of these questions, as the service sends them to the index."""
    settings = installation.settings
    url = settings.opensearch.url.partition(",")[0]
    target = Target(f"{url}/{settings.names.chunks_alias}/_msearch")
    option = orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
    requests = []
    for search in await searches_of(settings, asked):
        lines = codec.search_lines(search, "bench", ef_search=settings.opensearch.ef_search)
        requests.append(target.request(b"".join(orjson.dumps(line, option=option) for line in lines), _NDJSON))
    turns = itertools.cycle(requests)
    return target, lambda: next(turns)
