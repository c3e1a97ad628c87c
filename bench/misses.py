"""Questions that nobody has asked before, beside the index alone and beside the usual way to search."""

import itertools
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from os import cpu_count
from pathlib import Path
from typing import Any, Final

import orjson

from bench.beside import beside
from bench.installation import Installation
from bench.loaded import Ground, empty_cache, loaded
from bench.searches import searches_of
from freshline.loadtest.drive import straining, users_ask
from freshline.loadtest.lines import Target
from freshline.loadtest.questions import read_questions
from freshline.loadtest.tally import Tally
from freshline.services import query_target
from infra.embedding.factory import open_embedder
from infra.opensearch import codec
from infra.settings import Settings
from query.cache.key import normalised

IN_FLIGHT: Final = (1, 16, 64)
_BODIES: Final = 1_500
"""Searches of the index alone, sent again and again: it keeps no results of searches that have hits."""

_NDJSON: Final = "application/x-ndjson"


async def bench_misses(
    ground: Ground,
    questions: Path,
    *,
    in_flight: Sequence[int],
    seconds: float,
    warm_s: float,
) -> dict[str, Any]:
    """For each number of questions at a time, in turns: the index alone, a usual search service, and this one.

    The service comes in the middle, the others before and after it. The most answers that there could be are those for
    which index and model alone fill all cores.

    Args:
        ground: of whose history the last state is searched.
        questions: what is asked, each once, then with a number behind it.
        in_flight: questions at a time.
        seconds: for each of the three.
        warm_s: for so long each of the services is asked before anything is measured.

    Raises:
        BenchmarkFailed: the installation, or what it is compared with, did not start.
    """
    asked = read_questions(questions)
    found = []
    async with loaded(ground, "last") as installation, beside("vectors", installation) as (usual, _):
        target = query_target(installation.settings)
        new, usual_new = new_questions(target, asked), new_questions(usual, asked)
        index, searches = await _searches(installation, asked[:_BODIES])
        model_ms = await _model_ms(installation.settings, asked[:_BODIES])
        ground.say("warm-up", "servers that were just started compile themselves while they work")
        for warmed, questions_of in ((target, new), (usual, usual_new)):
            noted, ask = Tally().note_other, partial(next, questions_of)
            await users_ask(warmed, ask, noted, users=max(in_flight), think_s=0, seconds=warm_s)
        for places in in_flight:
            ground.say("misses", f"{places} at a time")
            alone, bare = Tally(), Tally()
            ask_usual = partial(users_ask, usual, partial(next, usual_new), bare.note_other, users=places, think_s=0)
            ask_index = partial(users_ask, index, searches, alone.note_other, users=places, think_s=0)
            index_s = await _spent_by_index(installation, ask_index(seconds=seconds / 2))
            await ask_usual(seconds=seconds / 2)
            await empty_cache(installation)
            used_s = installation.cpu_s()
            figures = await _drive(target, partial(next, new), places, seconds)
            cpu_s = {name: now_s - used_s[name] for name, now_s in installation.cpu_s().items()}
            await ask_usual(seconds=seconds / 2)
            index_s += await _spent_by_index(installation, ask_index(seconds=seconds / 2))
            alone_figures, usual_figures = alone.figures(seconds), bare.figures(seconds)
            index_ms = index_s * 1_000 / max(1, alone_figures["requests"])
            most_per_s = (cpu_count() or 1) * 1_000 / (index_ms + model_ms)
            found.append(
                {
                    "in_flight": places,
                    **figures,
                    "usual_service": usual_figures,
                    "ratio_to_usual": round(figures["answers_per_s"] / usual_figures["answers_per_s"], 3),
                    "p50_to_usual": round(figures["p50_ms"] / usual_figures["p50_ms"], 3),
                    "index_alone": alone_figures,
                    "ratio_to_index": round(figures["answers_per_s"] / alone_figures["answers_per_s"], 3),
                    "index_alone_cpu_ms": round(index_ms, 2),
                    "model_cpu_ms": round(model_ms, 2),
                    "most_answers_per_s": round(most_per_s, 1),
                    "share_of_most": round(figures["answers_per_s"] / most_per_s, 3),
                    "cpu_ms_each": {
                        name: round(used * 1_000 / max(1, figures["requests"]), 2) for name, used in cpu_s.items()
                    },
                }
            )
    return {"misses": found}


async def _model_ms(settings: Settings, questions: Sequence[str]) -> float:
    """Processor time that the model takes for a question."""
    embedder = open_embedder(settings.embedding)
    try:
        await embedder.embed_query(questions[0])
        began_s = time.process_time()
        for question in questions:
            await embedder.embed_query(normalised(question))
        return (time.process_time() - began_s) * 1_000 / len(questions)
    finally:
        await embedder.close()


async def _spent_by_index(installation: Installation, work: Awaitable[object]) -> float:
    """Processor seconds of all its nodes meanwhile."""

    def used_s() -> float:
        return sum(used for name, used in installation.cpu_s().items() if name.startswith("opensearch"))

    began_s = used_s()
    await work
    return used_s() - began_s


async def _drive(target: Target, ask: Callable[[], bytes], places: int, seconds: float) -> dict[str, Any]:
    tally = Tally()
    async with straining() as strain:
        await users_ask(target, ask, tally.note, users=places, think_s=0, seconds=seconds)
    return {**tally.figures(seconds), "generator": strain.figures()}


def new_questions(target: Target, asked: Sequence[str]) -> Iterator[bytes]:
    """Requests without end, each for a question that nobody has asked: the given ones, then with a number behind."""
    for turn in itertools.count():
        for question in asked:
            text = f"{question} {turn}" if turn else question
            yield target.request(orjson.dumps({"query": text}))


async def _searches(installation: Installation, asked: Sequence[str]) -> tuple[Target, Callable[[], bytes]]:
    """The searches that the service makes of these questions, as it sends them to the index."""
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
