"""Ground truth of retrieval by brute force, which cached answers are compared with.

Shares no code with retrieval, fusion, or the evaluation of answers, so that it cannot share their mistakes. Terms come
from the analyzer of the index and vectors from the model; scores, order and fusion are computed here, in double
precision. Nothing is pruned: after each change every question is ranked over every passage. Only what cannot have
changed is cached: cosines, and the fusion of unchanged rankings.

Document count, average length and frequencies are those of the live passages. Lucene also counts deleted passages for a
while, which is one reason why a real search may rank differently.
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
"""Scores that are equal after rounding are ties; the older passage ranks first."""
_AGE_OFFSET: Final = 10.0 ** -(_DECIMALS + 6)
"""Offset between passages of the same score, by age."""
_ROWS_AT_ONCE: Final = 128
_FIRST_COLUMNS: Final = 256

Doubles = NDArray[np.float64]
Births = NDArray[np.int64]
"""Sequence numbers of passages, in order of insertion."""


@dataclass(frozen=True, slots=True)
class AnalyzedQuestion:
    """A question: its unit vector, and its terms with their frequencies."""

    vector: Vector
    terms: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Ranked candidates of a retriever, best first.

    Attributes:
        names: ids of all passages so far, by sequence number.
        best: sequence numbers of the candidates.
        scores: their scores, rounded to seven decimals.
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
class GroundTruthResult:
    """True result of a question.

    Attributes:
        top: ids of the best passages after fusion.
        vector: scores are (1 + cosine) / 2.
        lexical: only passages with a term of the question.
    """

    top: tuple[str, ...]
    vector: Ranking
    lexical: Ranking


class GroundTruth:
    """All passages, and the result of each question.

    Takes eight bytes for each pair of question and passage.

    Args:
        questions: all questions.
        fused: candidates of each retriever that are fused.
        kept: candidates of each retriever that are returned.
        top_k: results.
        rrf_k: constant of the fusion.
    """

    def __init__(self, questions: Sequence[AnalyzedQuestion], *, fused: int, kept: int, top_k: int, rrf_k: int) -> None:
        self._fused, self._kept, self._top_k, self._rrf_k = fused, kept, top_k, rrf_k
        self._asked = [list(question.terms.items()) for question in questions]
        self._question_vectors = np.array([question.vector for question in questions], dtype=np.float64)
        # Term → column of each passage that contains it → frequency; and the same as two arrays, computed on demand.
        self._term_columns: dict[str, dict[int, int]] = {term: {} for question in questions for term in question.terms}
        self._arrays: dict[str, tuple[NDArray[np.intp], Doubles]] = {}
        self._names: list[str] = []
        self._columns: dict[str, int] = {}
        self._terms: dict[str, Mapping[str, int]] = {}
        self._free: list[int] = []
        self._births: Births = np.empty(0, dtype=np.int64)
        self._lengths: Doubles = np.empty(0)
        # Sort keys of the vector retriever; infinite in columns without a passage.
        self._keys: Doubles = np.empty((len(questions), 0))
        self._fusions: dict[int, tuple[tuple[bytes, bytes], tuple[str, ...]]] = {}

    def __len__(self) -> int:
        return len(self._columns)

    def change(self, removed: Collection[str], added: Mapping[str, tuple[Vector, Mapping[str, int]]]) -> None:
        """Remove passages, then add others, each with its vector and all its terms."""
        for name in removed:
            column = self._columns.pop(name)
            for term in self._terms.pop(name).keys() & self._term_columns.keys():
                del self._term_columns[term][column]
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
        self._keys[:, columns] = births * _AGE_OFFSET - scores.round(_DECIMALS)
        self._births[columns] = births
        self._names += added
        for column, (name, (_, frequencies)) in zip(columns, added.items(), strict=True):
            self._columns[name] = column
            self._terms[name] = frequencies
            self._lengths[column] = sum(frequencies.values())
            for term in frequencies.keys() & self._term_columns.keys():
                self._term_columns[term][column] = frequencies[term]
                self._arrays.pop(term, None)

    @property
    def total_length(self) -> int:
        """Terms in all passages."""
        return int(self._lengths.sum())

    def frequencies(self) -> dict[str, int]:
        """Document frequency of each term of the questions."""
        return {term: len(frequencies) for term, frequencies in self._term_columns.items()}

    def find(self) -> list[GroundTruthResult]:
        """The result of each question, in their order."""
        contributions = self._term_contributions()
        return [
            self._result(number, vector, lexical)
            for start in range(0, len(self._asked), _ROWS_AT_ONCE)
            for number, (vector, lexical) in enumerate(self._rankings(start, contributions), start=start)
        ]

    def _grow(self, more: int) -> None:
        rows, columns = self._keys.shape
        self._free += range(columns + more - 1, columns - 1, -1)
        self._keys = np.hstack([self._keys, np.full((rows, more), np.inf)])
        self._births = np.concatenate([self._births, np.zeros(more, dtype=np.int64)])
        self._lengths = np.concatenate([self._lengths, np.zeros(more)])

    def _rankings(
        self, start: int, contributions: Mapping[str, tuple[NDArray[np.intp], Doubles]]
    ) -> Iterator[tuple[Ranking, Ranking]]:
        """Rankings of both retrievers for a batch of questions from ``start``."""
        asked = self._asked[start : start + _ROWS_AT_ONCE]
        scores = np.zeros((len(asked), self._keys.shape[1]))
        for row, terms in enumerate(asked):
            for term, repeats in terms:
                columns, contribution = contributions[term]
                scores[row, columns] += repeats * contribution
        found = scores > 0
        lexical = np.where(found, self._births * _AGE_OFFSET - scores.round(_DECIMALS), np.inf)
        return zip(self._best(self._keys[start : start + len(asked)]), self._best(lexical), strict=True)

    def _best(self, keys: Doubles) -> Iterator[Ranking]:
        """The lowest ``keys`` of each row."""
        count = min(keys.shape[1], self._kept)
        if count:
            best = np.argpartition(keys, count - 1, axis=1)[:, :count]
            best = np.take_along_axis(best, np.take_along_axis(keys, best, axis=1).argsort(axis=1), axis=1)
        else:
            best = np.empty((len(keys), 0), dtype=np.intp)
        for columns, of_row in zip(best, keys, strict=True):
            present = columns[np.isfinite(of_row[columns])]
            births = self._births[present]
            yield Ranking(self._names, births, (births * _AGE_OFFSET - of_row[present]).round(_DECIMALS))

    def _term_contributions(self) -> dict[str, tuple[NDArray[np.intp], Doubles]]:
        """BM25 contribution of each term: columns of the passages that contain it, and values."""
        count = len(self)
        average = max(self.total_length / max(count, 1), 1)
        coarse = np.array([coarse_length(int(length)) for length in self._lengths], dtype=np.float64)
        norms = _K1 * (1 - _B + _B * coarse / average)
        contributions = {}
        for term, frequencies in self._term_columns.items():
            if term not in self._arrays:
                columns = np.fromiter(frequencies, dtype=np.intp, count=len(frequencies))
                self._arrays[term] = (
                    columns,
                    np.fromiter(frequencies.values(), dtype=np.float64, count=len(frequencies)),
                )
            columns, counts = self._arrays[term]
            weight = math.log(1 + (count - len(frequencies) + 0.5) / (len(frequencies) + 0.5))
            contributions[term] = columns, weight * counts / (counts + norms[columns])
        return contributions

    def _result(self, number: int, vector: Ranking, lexical: Ranking) -> GroundTruthResult:
        rankings = [one.best[: self._fused] for one in (vector, lexical)]
        orders = rankings[0].tobytes(), rankings[1].tobytes()
        previous, top = self._fusions.get(number, (None, ()))
        if orders != previous:
            top = self._fused_top(*(one.tolist() for one in rankings))
            self._fusions[number] = orders, top
        return GroundTruthResult(top, vector, lexical)

    def _fused_top(self, *rankings: Sequence[int]) -> tuple[str, ...]:
        ranks = [{at: rank for rank, at in enumerate(one, start=1)} for one in rankings]

        def order(at: int) -> tuple[float, float, str]:
            by_vector, by_words = (1 / (self._rrf_k + found[at]) if at in found else 0.0 for found in ranks)
            return -(by_vector + by_words), ranks[0].get(at, math.inf), self._names[at]

        return tuple(self._names[at] for at in sorted({*ranks[0], *ranks[1]}, key=order)[: self._top_k])


def coarse_length(length: int) -> int:
    """A field length as Lucene encodes it in one byte: exact below 40, then four significant bits above 24."""
    above = max(length - 24, 0)
    dropped = max(above.bit_length() - 4, 0)
    return min(length, 24) + (above >> dropped << dropped)
