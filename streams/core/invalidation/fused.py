"""Reciprocal rank fusion of one answer, from the ids of both windows.

The rule is that of the query tier: a passage's score is the sum of 1 / (k + rank) over the legs whose fused places hold
it; equal scores are ordered by the vector rank. Many answers at once are fused by ``verdicts``.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

_TIE: Final = 1e-12
"""Raises a score by its vector rank: far less than the scores of two different pairs of ranks differ."""


def top_of(vector: Sequence[str], lexical: Sequence[str], top: int, *, places: int, rrf_k: int) -> frozenset[str]:
    """The passages of the answer; the ids are given best first."""
    fused = max(top, places)
    scores: dict[str, float] = defaultdict(float)
    for rank, name in enumerate(vector[:fused], start=1):
        scores[name] += 1 / (rrf_k + rank) + _TIE / rank
    for rank, name in enumerate(lexical[:fused], start=1):
        scores[name] += 1 / (rrf_k + rank)
    return frozenset(sorted(scores, key=lambda name: -scores[name])[:top])
