"""Reciprocal rank fusion of vector and lexical hits."""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from schemas.search import Candidates, Hit

ABSENT: Final = math.inf
"""Rank of a passage that a retriever did not return among its candidates."""


class FusedHit(NamedTuple):
    """A passage in the fused ranking.

    Attributes:
        hit: hit of the vector retriever, or of the lexical retriever if only that returned the passage.
        score: sum of 1 / (k + rank) over both retrievers.
        vector_rank: rank among the vector candidates, from 1, or ``ABSENT``.
        lexical_rank: rank among the lexical candidates, from 1, or ``ABSENT``.
    """

    hit: Hit
    score: float
    vector_rank: float
    lexical_rank: float


def fuse(candidates: Candidates, *, k: int = 60) -> list[FusedHit]:
    """All candidates of both retrievers, best first.

    Scores of the retrievers are not comparable, but ranks are. Ties are broken by vector rank, then by chunk id, so the
    ranking is deterministic. Source: Cormack, Clarke and Büttcher, SIGIR 2009; their k is 60.
    """
    vector_ranks, lexical_ranks = _ranks(candidates.vector), _ranks(candidates.lexical)
    fused = [
        _fused(hit, vector_ranks.get(hit.chunk_id, ABSENT), lexical_ranks.get(hit.chunk_id, ABSENT), k)
        for hit in {hit.chunk_id: hit for hit in (*candidates.lexical, *candidates.vector)}.values()
    ]
    return sorted(fused, key=lambda hit: (-hit.score, hit.vector_rank, hit.hit.chunk_id))


def _ranks(hits: Sequence[Hit]) -> dict[str, int]:
    return {hit.chunk_id: rank for rank, hit in enumerate(hits, start=1)}


def _fused(hit: Hit, vector_rank: float, lexical_rank: float, k: int) -> FusedHit:
    # An absent rank is infinite and contributes nothing.
    return FusedHit(hit, 1 / (k + vector_rank) + 1 / (k + lexical_rank), vector_rank, lexical_rank)
