"""What a fresh retrieval finds, by computing every score: the truth that cached answers are compared with.

Shares no code with retrieval, fusion, or the judging of answers: a mistake of theirs cannot be a mistake here. Terms
are the index's analyser's, vectors the model's; scores, order and fusion are computed here, in double precision.

Document count, average length and frequencies are those of the passages that are there. Lucene's also count removed
passages for a while, which is one reason why a real search may order passages otherwise.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from infra.opensearch.port import Vector

_K1: Final = 1.2
_B: Final = 0.75
_DECIMALS: Final = 7
"""Scores closer than this are ties, of which the older passage comes first."""

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its vector of unit length and its terms, each with how often it occurs."""

    vector: Vector
    terms: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Leg:
    """A leg's window: places of passages, best first, among ``names``; and the score of every passage."""

    names: Sequence[str]
    best: NDArray[np.intp]
    scores: Doubles

    def window(self) -> tuple[tuple[str, float], ...]:
        """(id, score), best first."""
        return tuple((self.names[at], float(self.scores[at])) for at in self.best)


@dataclass(frozen=True, slots=True)
class Found:
    """What one question finds.

    Attributes:
        top: ids of the best passages in the fused order.
        vector: scores are (1 + cosine) / 2.
        lexical: all in the window have a term of the question.
    """

    top: tuple[str, ...]
    vector: Leg
    lexical: Leg


class Truth:
    """All passages, and what each question finds among them.

    Holds eight bytes for each pair of a passage and a term of the questions.

    Args:
        questions: all that will be asked.
        fused: places of each leg that are fused.
        kept: places of each leg that are told.
        top_k: passages wanted of the fused order.
        rrf_k: constant of the fusion.
    """

    def __init__(self, questions: Sequence[Question], *, fused: int, kept: int, top_k: int, rrf_k: int) -> None:
        self._questions = questions
        self._fused, self._kept, self._top_k, self._rrf_k = fused, kept, top_k, rrf_k
        self._term_rows = {term: row for row, term in enumerate(sorted({t for q in questions for t in q.terms}))}
        self._asked = [
            (
                np.array([self._term_rows[term] for term in question.terms], dtype=np.intp),
                np.array(list(question.terms.values()), dtype=np.float64),
            )
            for question in questions
        ]
        self._question_vectors = np.array([question.vector for question in questions], dtype=np.float64)
        self._names: list[str] = []
        self._vectors: Doubles = np.empty((0, self._question_vectors.shape[1]))
        self._lengths = np.empty(0, dtype=np.int64)
        self._counts: Doubles = np.empty((len(self._term_rows), 0))

    def __len__(self) -> int:
        return len(self._names)

    def change(self, removed: Collection[str], added: Mapping[str, tuple[Vector, Mapping[str, int]]]) -> None:
        """Take passages away, then add others; each with its vector and all its terms."""
        gone = set(removed)
        stays = np.array([name not in gone for name in self._names], dtype=bool)
        new = np.zeros((len(self._term_rows), len(added)))
        for column, (_, frequencies) in enumerate(added.values()):
            for term, count in frequencies.items():
                if term in self._term_rows:
                    new[self._term_rows[term], column] = count
        self._names = [name for name in self._names if name not in gone] + list(added)
        vectors = [np.asarray(vector, dtype=np.float64) for vector, _ in added.values()]
        self._vectors = np.vstack([self._vectors[stays], *vectors])
        lengths = [sum(frequencies.values()) for _, frequencies in added.values()]
        self._lengths = np.concatenate([self._lengths[stays], np.array(lengths, dtype=np.int64)])
        self._counts = np.hstack([self._counts[:, stays], new])

    @property
    def total_length(self) -> int:
        """Terms in all passages."""
        return int(self._lengths.sum())

    def frequencies(self) -> dict[str, int]:
        """Each term of the questions, with how many passages hold it."""
        held = (self._counts > 0).sum(axis=1)
        return {term: int(held[row]) for term, row in self._term_rows.items()}

    def find(self) -> list[Found]:
        """What each question finds now, in their order."""
        shares = self._term_shares()
        cosines = self._question_vectors @ self._vectors.T
        return [
            self._fuse((1 + cosines[number]) / 2, repeats @ shares[rows])
            for number, (rows, repeats) in enumerate(self._asked)
        ]

    def _term_shares(self) -> Doubles:
        """What each term adds to each passage's BM25, shape (terms, passages)."""
        count = len(self._names)
        held = (self._counts > 0).sum(axis=1)
        weights = np.log(1 + (count - held + 0.5) / (held + 0.5))
        average = max(self.total_length / max(count, 1), 1)
        coarse = np.array([coarse_length(int(length)) for length in self._lengths], dtype=np.float64)
        norms = _K1 * (1 - _B + _B * coarse / average)
        shares: Doubles = weights[:, None] * self._counts / (self._counts + norms)
        return shares

    def _fuse(self, vector: Doubles, lexical: Doubles) -> Found:
        legs = [self._best(vector, len(vector)), self._best(lexical, int((lexical > 0).sum()))]
        ranks = [{int(at): rank for rank, at in enumerate(leg[: self._fused], start=1)} for leg in legs]

        def order(at: int) -> tuple[float, float, str]:
            by_vector, by_words = (1 / (self._rrf_k + found[at]) if at in found else 0.0 for found in ranks)
            return -(by_vector + by_words), ranks[0].get(at, math.inf), self._names[at]

        top = sorted({*ranks[0], *ranks[1]}, key=order)[: self._top_k]
        return Found(
            tuple(self._names[at] for at in top),
            Leg(self._names, legs[0], vector),
            Leg(self._names, legs[1], lexical),
        )

    def _best(self, scores: Doubles, count: int) -> NDArray[np.intp]:
        """Places of the best passages, the best first."""
        places = min(count, self._kept)
        if not places:
            return np.empty(0, dtype=np.intp)
        # Passages stand in the order of their births, so a little less for each later one settles ties.
        keys = np.arange(len(scores)) * 10.0 ** -(_DECIMALS + 6) - scores.round(_DECIMALS)
        best = np.argpartition(keys, places - 1)[:places]
        return best[np.argsort(keys[best])]


def coarse_length(length: int) -> int:
    """A length as Lucene keeps it in one byte: exact below 40, then four significant bits of what is above 24."""
    above = max(length - 24, 0)
    dropped = max(above.bit_length() - 4, 0)
    return min(length, 24) + (above >> dropped << dropped)
