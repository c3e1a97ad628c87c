"""What a fresh retrieval finds, by computing every score: the truth that cached answers are compared with.

Shares no code with retrieval, fusion, or the judging of answers: a mistake of theirs cannot be a mistake here. Terms
are the index's analyser's, vectors the model's; scores, order and fusion are computed here, in double precision.
Nothing is pruned: after each change every question is ranked over every passage. What cannot have changed is kept from
one time to the next, and no more: the cosine of a question and a passage, and the fusion of two orders that are the
same as before.

Document count, average length and frequencies are those of the passages that are there. Lucene's also count removed
passages for a while, which is one reason why a real search may order passages otherwise.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from schemas.search import Vector

_K1: Final = 1.2
_B: Final = 0.75
_DECIMALS: Final = 7
"""Scores closer than this are ties, of which the older passage comes first."""
_LATER: Final = 10.0 ** -(_DECIMALS + 6)
"""What each later passage is behind the one before it, of the same score."""
_ROWS_AT_ONCE: Final = 128
_FIRST_COLUMNS: Final = 256

Doubles = NDArray[np.float64]
Births = NDArray[np.int64]
"""Numbers of passages in the order in which they came."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its vector of unit length and its terms, each with how often it occurs."""

    vector: Vector
    terms: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Leg:
    """A leg's window, best first.

    Attributes:
        names: of all passages that ever were, by their birth.
        best: births of the passages in the window.
        scores: of those, to seven decimals.
    """

    names: Sequence[str]
    best: Births
    scores: Doubles

    def window(self) -> tuple[tuple[str, float], ...]:
        """(id, score), best first."""
        return tuple(
            (self.names[at], score) for at, score in zip(self.best.tolist(), self.scores.tolist(), strict=True)
        )


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

    Holds eight bytes for each pair of a question and a passage.

    Args:
        questions: all that will be asked.
        fused: places of each leg that are fused.
        kept: places of each leg that are told.
        top_k: passages wanted of the fused order.
        rrf_k: constant of the fusion.
    """

    def __init__(self, questions: Sequence[Question], *, fused: int, kept: int, top_k: int, rrf_k: int) -> None:
        self._fused, self._kept, self._top_k, self._rrf_k = fused, kept, top_k, rrf_k
        self._asked = [list(question.terms.items()) for question in questions]
        self._question_vectors = np.array([question.vector for question in questions], dtype=np.float64)
        # Term → column of each passage that holds it → how often; and the same as two arrays, made when needed.
        self._holders: dict[str, dict[int, int]] = {term: {} for question in questions for term in question.terms}
        self._arrays: dict[str, tuple[NDArray[np.intp], Doubles]] = {}
        self._names: list[str] = []
        self._columns: dict[str, int] = {}
        self._terms: dict[str, Mapping[str, int]] = {}
        self._free: list[int] = []
        self._births: Births = np.empty(0, dtype=np.int64)
        self._lengths: Doubles = np.empty(0)
        # What the vector leg is ordered by; infinite where there is no passage.
        self._keys: Doubles = np.empty((len(questions), 0))
        self._fusions: dict[int, tuple[tuple[bytes, bytes], tuple[str, ...]]] = {}

    def __len__(self) -> int:
        return len(self._columns)

    def change(self, removed: Collection[str], added: Mapping[str, tuple[Vector, Mapping[str, int]]]) -> None:
        """Take passages away, then add others; each with its vector and all its terms."""
        for name in removed:
            column = self._columns.pop(name)
            for term in self._terms.pop(name).keys() & self._holders.keys():
                del self._holders[term][column]
                self._arrays.pop(term, None)
            self._keys[:, column] = np.inf
            self._lengths[column] = 0
            self._free.append(column)
        if not added:
            return
        if len(self._free) < len(added):
            self._grow(max(_FIRST_COLUMNS, len(added), self._keys.shape[1] // 4))
        columns = [self._free.pop() for _ in added]
        births = np.arange(len(self._names), len(self._names) + len(added))
        vectors = np.array([vector for vector, _ in added.values()], dtype=np.float64)
        scores = (1 + self._question_vectors @ vectors.T) / 2
        self._keys[:, columns] = births * _LATER - scores.round(_DECIMALS)
        self._births[columns] = births
        self._names += added
        for column, (name, (_, frequencies)) in zip(columns, added.items(), strict=True):
            self._columns[name] = column
            self._terms[name] = frequencies
            self._lengths[column] = sum(frequencies.values())
            for term in frequencies.keys() & self._holders.keys():
                self._holders[term][column] = frequencies[term]
                self._arrays.pop(term, None)

    @property
    def total_length(self) -> int:
        """Terms in all passages."""
        return int(self._lengths.sum())

    def frequencies(self) -> dict[str, int]:
        """Each term of the questions, with how many passages hold it."""
        return {term: len(holders) for term, holders in self._holders.items()}

    def find(self) -> list[Found]:
        """What each question finds now, in their order."""
        shares = self._term_shares()
        return [
            self._found(number, vector, lexical)
            for start in range(0, len(self._asked), _ROWS_AT_ONCE)
            for number, (vector, lexical) in enumerate(self._legs(start, shares), start=start)
        ]

    def _grow(self, more: int) -> None:
        rows, columns = self._keys.shape
        self._free += range(columns + more - 1, columns - 1, -1)
        self._keys = np.hstack([self._keys, np.full((rows, more), np.inf)])
        self._births = np.concatenate([self._births, np.zeros(more, dtype=np.int64)])
        self._lengths = np.concatenate([self._lengths, np.zeros(more)])

    def _legs(self, start: int, shares: Mapping[str, tuple[NDArray[np.intp], Doubles]]) -> Iterator[tuple[Leg, Leg]]:
        """Both legs of some questions from ``start`` on."""
        asked = self._asked[start : start + _ROWS_AT_ONCE]
        scores = np.zeros((len(asked), self._keys.shape[1]))
        for row, terms in enumerate(asked):
            for term, repeats in terms:
                columns, share = shares[term]
                scores[row, columns] += repeats * share
        found = scores > 0
        lexical = np.where(found, self._births * _LATER - scores.round(_DECIMALS), np.inf)
        return zip(self._best(self._keys[start : start + len(asked)]), self._best(lexical), strict=True)

    def _best(self, keys: Doubles) -> Iterator[Leg]:
        """The first of each row by ``keys``."""
        places = min(keys.shape[1], self._kept)
        if places:
            best = np.argpartition(keys, places - 1, axis=1)[:, :places]
            best = np.take_along_axis(best, np.take_along_axis(keys, best, axis=1).argsort(axis=1), axis=1)
        else:
            best = np.empty((len(keys), 0), dtype=np.intp)
        for columns, of_row in zip(best, keys, strict=True):
            there = columns[np.isfinite(of_row[columns])]
            births = self._births[there]
            yield Leg(self._names, births, (births * _LATER - of_row[there]).round(_DECIMALS))

    def _term_shares(self) -> dict[str, tuple[NDArray[np.intp], Doubles]]:
        """What each term adds to the BM25 of the passages that hold it: their columns, and how much."""
        count = len(self)
        average = max(self.total_length / max(count, 1), 1)
        coarse = np.array([coarse_length(int(length)) for length in self._lengths], dtype=np.float64)
        norms = _K1 * (1 - _B + _B * coarse / average)
        shares = {}
        for term, holders in self._holders.items():
            if term not in self._arrays:
                columns = np.fromiter(holders, dtype=np.intp, count=len(holders))
                self._arrays[term] = columns, np.fromiter(holders.values(), dtype=np.float64, count=len(holders))
            columns, counts = self._arrays[term]
            weight = math.log(1 + (count - len(holders) + 0.5) / (len(holders) + 0.5))
            shares[term] = columns, weight * counts / (counts + norms[columns])
        return shares

    def _found(self, number: int, vector: Leg, lexical: Leg) -> Found:
        legs = [leg.best[: self._fused] for leg in (vector, lexical)]
        orders = legs[0].tobytes(), legs[1].tobytes()
        known, top = self._fusions.get(number, (None, ()))
        if orders != known:
            top = self._fused_top(*(leg.tolist() for leg in legs))
            self._fusions[number] = orders, top
        return Found(top, vector, lexical)

    def _fused_top(self, *legs: Sequence[int]) -> tuple[str, ...]:
        ranks = [{at: rank for rank, at in enumerate(leg, start=1)} for leg in legs]

        def order(at: int) -> tuple[float, float, str]:
            by_vector, by_words = (1 / (self._rrf_k + found[at]) if at in found else 0.0 for found in ranks)
            return -(by_vector + by_words), ranks[0].get(at, math.inf), self._names[at]

        return tuple(self._names[at] for at in sorted({*ranks[0], *ranks[1]}, key=order)[: self._top_k])


def coarse_length(length: int) -> int:
    """A length as Lucene keeps it in one byte: exact below 40, then four significant bits of what is above 24."""
    above = max(length - 24, 0)
    dropped = max(above.bit_length() - 4, 0)
    return min(length, 24) + (above >> dropped << dropped)
