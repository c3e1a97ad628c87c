"""How much of what is nearest the vector leg finds, and what a wider walk of its graph costs.

The truth is an exact search: the index scores every passage. All widths are asked for each question in turn, so that a
drifting machine favours none.
"""

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import orjson
from opensearchpy import AsyncOpenSearch

from bench.loaded import Ground, loaded
from bench.searches import searches_of
from freshline.figures import spread
from freshline.loadtest.questions import read_questions
from infra.opensearch import codec
from infra.opensearch.client import connect
from infra.opensearch.store import check_whole
from infra.settings import Settings
from schemas.search import HybridSearch

WIDTHS: Final = (1, 200, 400, 800, 1_600)
_PLACES: Final = (5, 50, 120)
_SEED: Final = 1


@dataclass(slots=True)
class _Found:
    """What one width found.

    Attributes:
        took_ms: of each search.
        shares: of the truth, by the number of first places that are compared.
        same: whether the order of what is fused was that of the truth.
    """

    took_ms: list[float] = field(default_factory=list)
    shares: dict[int, list[float]] = field(default_factory=lambda: {places: [] for places in _PLACES})
    same: list[bool] = field(default_factory=list)


async def bench_recall(
    ground: Ground,
    questions: Path,
    *,
    widths: Sequence[int],
    sample: int,
) -> list[dict[str, Any]]:
    """Compare the vector leg's windows with those of an exact search.

    Args:
        ground: of whose history the snapshot is searched.
        questions: what is asked.
        widths: values of ``FRESHLINE_OPENSEARCH__EF_SEARCH``; the window itself where it is wider.
        sample: questions that are drawn.

    Raises:
        BenchmarkFailed: the installation did not start.
    """
    asked = read_questions(questions)
    random.Random(_SEED).shuffle(asked)  # noqa: S311 - a sample
    async with loaded(ground) as installation:
        settings = installation.settings
        searches = await searches_of(settings, asked[:sample])
        ground.say("recall", f"{len(searches)} questions, {len(widths)} widths and an exact search for each")
        client = connect(settings.opensearch)
        try:
            exact_ms, found = await _compared(client, settings, searches, widths)
        finally:
            await client.close()
    return [
        {
            "questions": len(searches),
            "ef_search": width,
            **{f"recall_at_{places}": round(statistics.mean(one.shares[places]), 4) for places in _PLACES},
            "same_order_share": round(statistics.mean(one.same), 3),
            "ms": spread(one.took_ms),
            "exact_ms": spread(exact_ms),
        }
        for width, one in found.items()
    ]


async def _compared(
    client: AsyncOpenSearch, settings: Settings, searches: Sequence[HybridSearch], widths: Sequence[int]
) -> tuple[list[float], dict[int, _Found]]:
    exact_ms: list[float] = []
    found = {width: _Found() for width in widths}
    fused = settings.query.window

    async def ids(body: Mapping[str, Any], took_ms: list[float]) -> list[str]:
        began_s = time.perf_counter()
        answer = await client.search(index=settings.names.chunks_alias, body=body)
        took_ms.append((time.perf_counter() - began_s) * 1_000)
        check_whole(answer)
        return list(codec.read_ids(answer))

    for search in searches:
        truth = await ids(_vector_leg(replace(search, exact=True), 1), exact_ms)
        for width, one in found.items():
            told = await ids(_vector_leg(search, width), one.took_ms)
            for places, shares in one.shares.items():
                shares.append(len({*truth[:places]}.intersection(told[:places])) / max(1, len(truth[:places])))
            one.same.append(told[:fused] == truth[:fused])
    return exact_ms, found


def _vector_leg(search: HybridSearch, width: int) -> dict[str, Any]:
    """The vector leg as it is searched."""
    body, _ = codec.search_bodies(search, ef_search=width)
    plain: dict[str, Any] = orjson.loads(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY))
    return plain
