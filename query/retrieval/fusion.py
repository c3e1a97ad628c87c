"""Reciprocal rank fusion: one order out of the places in two windows."""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from schemas.search import Hit, Windows

ABSENT: Final = math.inf
"""Rank of a passage that a leg's window does not hold."""


class Candidate(NamedTuple):
    """A passage in the fused order.

    Attributes:
        hit: as the vector leg found it, or the lexical leg where only that did.
        score: sum over the legs of 1 / (k + rank); the ranks explain it.
        vector_rank: place in the vector window from 1, or ``ABSENT``.
        lexical_rank: place in the lexical window from 1, or ``ABSENT``.
    """

    hit: Hit
    score: float
    vector_rank: float
    lexical_rank: float


def fuse(windows: Windows, *, k: int = 60) -> list[Candidate]:
    """All passages of both windows, best first.

    Raw scores of the legs are not comparable, ranks are. Equal scores are ordered by the better vector rank, then by
    chunk id, so the same windows always give the same order (Cormack, Clarke and Büttcher, SIGIR 2009; their k is 60).
    """
    vector_ranks, lexical_ranks = _ranks(windows.vector), _ranks(windows.lexical)
    candidates = [
        _candidate(hit, vector_ranks.get(hit.chunk_id, ABSENT), lexical_ranks.get(hit.chunk_id, ABSENT), k)
        for hit in {hit.chunk_id: hit for hit in (*windows.lexical, *windows.vector)}.values()
    ]
    return sorted(candidates, key=lambda found: (-found.score, found.vector_rank, found.hit.chunk_id))


def _ranks(window: Sequence[Hit]) -> dict[str, int]:
    return {hit.chunk_id: rank for rank, hit in enumerate(window, start=1)}


def _candidate(hit: Hit, vector_rank: float, lexical_rank: float, k: int) -> Candidate:
    # An absent rank is infinite, and its share zero.
    return Candidate(hit, 1 / (k + vector_rank) + 1 / (k + lexical_rank), vector_rank, lexical_rank)
