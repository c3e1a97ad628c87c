"""Questions that nobody has asked before, beside the index alone with the same searches in the same run."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from freshline.bench.installation import Installation
from freshline.bench.loaded import Ground, empty_cache, loaded
from freshline.bench.searches import searches_of
from freshline.load.drive import straining, users_ask
from freshline.load.lines import Target
from freshline.load.questions import read_questions
from freshline.load.tally import Tally
from freshline.services import query_target
from infra.opensearch import codec

IN_FLIGHT: Final = (1, 16, 64)
_WARM_UP_S: Final = 3.0
_BODIES: Final = 1_500
"""Searches of the index alone, sent again and again: it keeps no results of searches that have hits."""

_NDJSON: Final = "application/x-ndjson"


async def bench_misses(
    ground: Ground,
    questions: Path,
    *,
    in_flight: Sequence[int],
    seconds: float,
) -> dict[str, Any]:
    """For each number of questions at a time: the index alone, the service, and the index alone again.

    Args:
        ground: of whose history the last state is searched.
        questions: what is asked, each once, then with a number behind it.
        in_flight: questions at a time.
        seconds: for the service, and for the index alone.

    Raises:
        BenchmarkFailed: the installation did not start.
    """
    asked = read_questions(questions)
    found = []
    async with loaded(ground, "last") as installation:
        target = query_target(installation.settings)
        new = new_questions(target, asked)
        index, searches = await _searches(installation, asked[:_BODIES])
        ground.say("warm-up", "servers that were just started compile themselves while they work")
        await _drive(target, lambda: next(new), max(in_flight), _WARM_UP_S)
        for places in in_flight:
            ground.say("misses", f"{places} at a time")
            alone = Tally()
            await users_ask(index, searches, alone.note_other, users=places, think_s=0, seconds=seconds / 2)
            await empty_cache(installation)
            used_s = installation.cpu_s()
            figures = await _drive(target, lambda: next(new), places, seconds)
            cpu_s = {name: now_s - used_s[name] for name, now_s in installation.cpu_s().items()}
            await users_ask(index, searches, alone.note_other, users=places, think_s=0, seconds=seconds / 2)
            alone_figures = alone.figures(seconds)
            found.append(
                {
                    "in_flight": places,
                    **figures,
                    "index_alone": alone_figures,
                    "ratio_to_index": round(figures["answers_per_s"] / alone_figures["answers_per_s"], 3),
                    "cpu_ms_each": {
                        name: round(used * 1_000 / max(1, figures["requests"]), 2) for name, used in cpu_s.items()
                    },
                }
            )
    return {"misses": found}


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
