"""Reciprocal rank fusion of many answers at once: which passages make each one's top k.

The rule is that of the query tier: a passage's score is the sum of 1 / (k + rank) over the legs whose fused places hold
it; equal scores are ordered by the vector rank. Rows are answers, columns places; within a row, order does not matter.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streams.core.invalidation.bm25 import Floats
from streams.core.invalidation.windows import NOBODY

Numbers = NDArray[np.int32]

_TIE = 1e-12
"""Raises a score by its vector rank: far less than the scores of two different pairs of ranks differ."""


def top_k(
    vector: tuple[Numbers, Floats], lexical: tuple[Numbers, Floats], top: NDArray[Any], *, places: int, rrf_k: int
) -> Numbers:
    """The passages of each row's answer.

    Args:
        vector: numbers and scores of the vector leg, shape (rows, window).
        lexical: likewise of the lexical leg.
        top: how many passages each row wants.
        places: of each leg that are fused; where a row wants more passages than that, as many as it wants.
        rrf_k: constant of the fusion.

    Returns:
        Numbers in ascending order, ``NOBODY`` first, shape (rows, largest of ``top``).
    """
    fused = np.maximum(top, places)
    by_vector, _ = _best(*vector, int(fused.max()))
    by_terms, _ = _best(*lexical, int(fused.max()))
    ranks = np.arange(1, by_vector.shape[1] + 1)
    numbers = np.concatenate((by_vector, by_terms), axis=1)
    numbers[np.tile(ranks, 2) > fused[:, None]] = NOBODY
    shares = 1.0 / (rrf_k + ranks)
    scores = np.where(numbers == NOBODY, 0.0, np.concatenate((shares + _TIE / ranks, shares)))
    # A passage of both legs comes twice: bring the two together, and give the sum to the first.
    order = np.argsort(numbers, axis=1)
    numbers = np.take_along_axis(numbers, order, axis=1)
    scores = np.take_along_axis(scores, order, axis=1)
    twice = (numbers[:, 1:] == numbers[:, :-1]) & (numbers[:, 1:] != NOBODY)
    scores[:, :-1] += np.where(twice, scores[:, 1:], 0.0)
    scores[:, 1:][twice] = 0.0
    numbers, scores = _best(numbers, scores, int(top.max()))
    chosen = (np.arange(1, numbers.shape[1] + 1) <= top[:, None]) & (scores > 0)
    return np.sort(np.where(chosen, numbers, NOBODY), axis=1)


def top_of(vector: Sequence[str], lexical: Sequence[str], top: int, *, places: int, rrf_k: int) -> frozenset[str]:
    """The same of one answer, from the ids of both windows, best first."""
    fused = max(top, places)
    scores: dict[str, float] = defaultdict(float)
    for rank, name in enumerate(vector[:fused], start=1):
        scores[name] += 1 / (rrf_k + rank) + _TIE / rank
    for rank, name in enumerate(lexical[:fused], start=1):
        scores[name] += 1 / (rrf_k + rank)
    return frozenset(sorted(scores, key=lambda name: -scores[name])[:top])


def _best(numbers: Numbers, scores: NDArray[Any], places: int) -> tuple[Numbers, NDArray[Any]]:
    """The best places of each row, in order."""
    if places < numbers.shape[1]:
        best = np.argpartition(-scores, places - 1, axis=1)[:, :places]
        numbers, scores = np.take_along_axis(numbers, best, axis=1), np.take_along_axis(scores, best, axis=1)
    order = np.argsort(-scores, axis=1)
    return np.take_along_axis(numbers, order, axis=1), np.take_along_axis(scores, order, axis=1)
