"""Reciprocal rank fusion of one answer, from the ids of its candidates.

Same rule as in the query service: a passage's score is the sum of 1 / (k + rank) over the retrievers whose fused
candidates contain it; equal scores are ordered by vector rank. ``verdicts`` fuses many answers at once.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

_TIE: Final = 1e-12
"""Tie breaker by vector rank: far smaller than the difference between the scores of any two pairs of ranks."""


def fused_top(
    vector: Sequence[str], lexical: Sequence[str], top: int, *, candidates: int, rrf_k: int
) -> frozenset[str]:
    """The passages of an answer.

    Args:
        vector: ids of the vector candidates, best first.
        lexical: ids of the lexical candidates, best first.
        top: number of passages of the answer.
        candidates: number of candidates of each retriever that are fused.
        rrf_k: constant of the fusion.
    """
    depth = max(top, candidates)
    scores: dict[str, float] = defaultdict(float)
    for rank, chunk_id in enumerate(vector[:depth], start=1):
        scores[chunk_id] += 1 / (rrf_k + rank) + _TIE / rank
    for rank, chunk_id in enumerate(lexical[:depth], start=1):
        scores[chunk_id] += 1 / (rrf_k + rank)
    return frozenset(sorted(scores, key=lambda chunk_id: -scores[chunk_id])[:top])
