"""Recall and latency of approximate vector search, by the number of candidates of the graph search.

An exact search is the reference. All settings are measured for each question in turn, so that machine drift affects all
of them alike.
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

from bench.preloaded import BenchmarkSetup, preloaded
from bench.searches import searches_of
from freshline.figures import spread
from freshline.loadtest.questions import read_questions
from infra.opensearch import codec
from infra.opensearch.client import connect
from infra.opensearch.index import check_whole
from infra.settings import Settings
from schemas.search import HybridSearch

CANDIDATE_COUNTS: Final = (1, 200, 400, 800, 1_600)
_CUTOFFS: Final = (5, 50, 120)
_SEED: Final = 1


@dataclass(slots=True)
class _CandidateRun:
    """Results with run number of candidates.

    Attributes:
        took_ms: latency of each search.
        recalls: cutoff → recall of each search.
        same_order: whether the fused candidates have the order of the exact search.
    """

    took_ms: list[float] = field(default_factory=list)
    recalls: dict[int, list[float]] = field(default_factory=lambda: {cutoff: [] for cutoff in _CUTOFFS})
    same_order: list[bool] = field(default_factory=list)


async def bench_recall(
    setup: BenchmarkSetup,
    questions: Path,
    *,
    candidate_counts: Sequence[int],
    sample: int,
) -> list[dict[str, Any]]:
    """Compare the candidates of the vector retriever with those of an exact search.

    Args:
        setup: the snapshot of its history is searched.
        questions: questions to ask.
        candidate_counts: values of ``FRESHLINE_OPENSEARCH__EF_SEARCH``; never fewer candidates than are requested.
        sample: number of sampled questions.

    Raises:
        BenchmarkFailed: the installation did not start.
    """
    asked = read_questions(questions)
    random.Random(_SEED).shuffle(asked)  # noqa: S311 - a sample
    async with preloaded(setup) as installation:
        settings = installation.settings
        searches = await searches_of(settings, asked[:sample])
        setup.say("recall", f"{len(searches)} questions, {len(candidate_counts)} settings and an exact search for each")
        client = connect(settings.opensearch)
        try:
            exact_ms, runs = await _compared(client, settings, searches, candidate_counts)
        finally:
            await client.close()
    return [
        {
            "questions": len(searches),
            "ef_search": candidates,
            **{f"recall_at_{cutoff}": round(statistics.mean(run.recalls[cutoff]), 4) for cutoff in _CUTOFFS},
            "same_order_rate": round(statistics.mean(run.same_order), 3),
            "ms": spread(run.took_ms),
            "exact_ms": spread(exact_ms),
        }
        for candidates, run in runs.items()
    ]


async def _compared(
    client: AsyncOpenSearch, settings: Settings, searches: Sequence[HybridSearch], candidate_counts: Sequence[int]
) -> tuple[list[float], dict[int, _CandidateRun]]:
    exact_ms: list[float] = []
    runs = {candidates: _CandidateRun() for candidates in candidate_counts}
    fused = settings.query.candidates

    async def ids(body: Mapping[str, Any], took_ms: list[float]) -> list[str]:
        began_s = time.perf_counter()
        answer = await client.search(index=settings.names.chunks_alias, body=body)
        took_ms.append((time.perf_counter() - began_s) * 1_000)
        check_whole(answer)
        return list(codec.read_ids(answer))

    for search in searches:
        truth = await ids(_vector_search(replace(search, exact=True), 1), exact_ms)
        for candidates, run in runs.items():
            approximate = await ids(_vector_search(search, candidates), run.took_ms)
            for cutoff, recalls in run.recalls.items():
                recalls.append(len({*truth[:cutoff]}.intersection(approximate[:cutoff])) / max(1, len(truth[:cutoff])))
            run.same_order.append(approximate[:fused] == truth[:fused])
    return exact_ms, runs


def _vector_search(search: HybridSearch, candidates: int) -> dict[str, Any]:
    """The search of the vector retriever, as it is sent."""
    body, _ = codec.search_bodies(search, ef_search=candidates)
    plain: dict[str, Any] = orjson.loads(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY))
    return plain
