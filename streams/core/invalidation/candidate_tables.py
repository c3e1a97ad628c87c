"""Tables of the candidates of one retriever: one row for each answer, one column for each slot, in no order.

Changes are applied in place: removed passages leave their slots, added ones are inserted by their own score, without a
search (``compiled``). The *floor* of a row is the score down to which its candidates are complete; nothing is known
about passages below it. If the candidates include everything that matches, the floor is minus infinity. When a full row
takes another passage, its lowest candidate is evicted and defines the new floor.

Vector scores never change. Lexical scores change with the statistics of the index, so lexical tables hold the data from
which scores are computed: the frequencies of the question's terms, and the length.
"""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from streams.core.invalidation.compiled import EMPTY, LexicalCandidates, VectorCandidates
from streams.core.invalidation.rows import Holders, Postings, Rows, grown

LOWEST: Final = -math.inf
HIGHEST: Final = math.inf

_BITS: Final = 64


def _empty_bits(slots: int) -> NDArray[np.uint64]:
    return np.empty((0, -(-slots // _BITS)), dtype=np.uint64)


def _late_bits(numbers: list[int], original: set[int] | None, words: int) -> NDArray[np.uint64]:
    """Bits of the slots with passages that became candidates after the fill; none for a new answer."""
    bits = np.zeros(words * _BITS, dtype=np.uint8)
    if original is not None:
        bits[: len(numbers)] = [number not in original for number in numbers]
    return np.packbits(bits, bitorder="little").view(np.uint64)


def _original(ids: NDArray[np.int32], late: NDArray[np.uint64]) -> set[int]:
    is_late = np.unpackbits(late.view(np.uint8), bitorder="little")[: len(ids)]
    return set(ids[(is_late == 0) & (ids != EMPTY)].tolist())


class VectorTable:
    """Numbers and scores of vector candidates.

    Args:
        slots: number of slots of each row.
    """

    def __init__(self, slots: int) -> None:
        self._ids = np.empty((0, slots), dtype=np.int32)
        self._scores = np.empty((0, slots), dtype=np.float32)
        self._late = _empty_bits(slots)
        self._floors = np.empty(0, dtype=np.float32)
        self._postings = Postings(lambda number, rows: (self._ids[rows] == number).any(axis=1))

    @property
    def arrays(self) -> VectorCandidates:
        """The arrays, valid until ``grow``."""
        return VectorCandidates(self._ids, self._scores, self._late, self._floors)

    def size_bytes(self, fraction: float) -> int:
        """Size of a fraction of the rows, with the index of passages."""
        return round(fraction * sum(table.nbytes for table in self.arrays)) + self._postings.size_bytes

    def grow(self, rows: int) -> None:
        """Grow to ``rows`` rows."""
        self._ids = grown(self._ids, rows)
        self._scores = grown(self._scores, rows)
        self._late = grown(self._late, rows)
        self._floors = grown(self._floors, rows, HIGHEST)

    def put(
        self, row: int, numbers: list[int], scores: list[float], *, is_complete: bool, original: set[int] | None = None
    ) -> None:
        """Fill a row.

        Args:
            row: row to fill.
            numbers: numbers of the passages, best first.
            scores: their scores.
            is_complete: the candidates include everything that matches.
            original: for an answer that is put again, the passages that were candidates at its fill.
        """
        self._ids[row], self._scores[row] = EMPTY, LOWEST
        self._late[row] = _late_bits(numbers, original, self._late.shape[1])
        self._ids[row, : len(numbers)] = numbers
        self._scores[row, : len(scores)] = scores
        self._floors[row] = LOWEST if is_complete else scores[-1]
        self._postings.add_row(row, numbers)

    def original(self, row: int) -> set[int]:
        """Passages that have been candidates since the fill."""
        return _original(self._ids[row], self._late[row])

    def clear(self, row: int) -> None:
        """Clear a row. It takes no passages until the next ``put``."""
        self._ids[row] = EMPTY
        self._floors[row] = HIGHEST

    def take_rows(self, number: int) -> Rows:
        """Rows that may contain a passage, possibly with duplicates. The caller removes it from all of them."""
        return self._postings.take(number)

    def add_rows(self, number: int, rows: Rows) -> None:
        """Record the rows that contain a passage."""
        if len(rows):
            self._postings.add(number, rows)


class LexicalTable:
    """Numbers of lexical candidates with the frequencies of the question's terms and the codes of their lengths.

    Args:
        slots: number of slots of each row.
        terms: maximum number of terms of a question.
    """

    def __init__(self, slots: int, terms: int) -> None:
        self._slots = slots
        self._ids = np.empty((0, slots), dtype=np.int32)
        self._lengths = np.empty((0, slots), dtype=np.uint8)
        self._late = _empty_bits(slots)
        self._floors = np.empty(0, dtype=np.float32)
        # A row has as many frequencies as its question has terms. Ranges of removed rows are reused by questions with
        # the same number of terms.
        self._frequencies = np.empty(0, dtype=np.uint16)
        self._starts = np.empty(0, dtype=np.int64)
        self._end = 0
        self._free: dict[int, list[int]] = {}
        # The passage that defined the floor, because the floor changes with the statistics too.
        self._floor_frequencies = np.empty((0, terms), dtype=np.uint16)
        self._floor_lengths = np.empty(0, dtype=np.uint8)
        self._terms = np.empty((0, terms), dtype=np.int32)
        self._repeats = np.empty((0, terms), dtype=np.float32)
        self._holders = Holders(terms)
        self._postings = Postings(lambda number, rows: (self._ids[rows] == number).any(axis=1))

    @property
    def arrays(self) -> LexicalCandidates:
        """The arrays, valid until ``grow`` or ``put``."""
        return LexicalCandidates(
            self._ids,
            self._lengths,
            self._late,
            self._floors,
            self._frequencies,
            self._starts,
            self._floor_frequencies,
            self._floor_lengths,
            self._terms,
            self._repeats,
        )

    def size_bytes(self, fraction: float) -> int:
        """Size of a fraction of the rows, with the indices of passages and terms."""
        tables = sum(table.nbytes for table in self.arrays) - self._frequencies.nbytes
        frequencies = self._end * self._frequencies.itemsize
        return round(fraction * tables) + frequencies + self._postings.size_bytes + self._holders.size_bytes

    def grow(self, rows: int) -> None:
        """Grow to ``rows`` rows."""
        self._ids = grown(self._ids, rows)
        self._lengths = grown(self._lengths, rows)
        self._late = grown(self._late, rows)
        self._floors = grown(self._floors, rows, HIGHEST)
        self._starts = grown(self._starts, rows)
        self._floor_frequencies = grown(self._floor_frequencies, rows)
        self._floor_lengths = grown(self._floor_lengths, rows)
        self._terms = grown(self._terms, rows, 0)
        self._repeats = grown(self._repeats, rows, 0)
        self._holders.grow(rows)

    def put(
        self,
        row: int,
        question: dict[int, int],
        numbers: list[int],
        frequencies: NDArray[Any],
        lengths: list[int],
        *,
        is_complete: bool,
        original: set[int] | None = None,
    ) -> None:
        """Fill an empty row. Its floor has no score until the next ``move_floors``.

        Args:
            row: row to fill.
            question: terms of the question with the number of their occurrences.
            numbers: numbers of the passages, best first.
            frequencies: frequencies of the terms, shape (terms, passages).
            lengths: length codes of the passages.
            is_complete: the candidates include everything that matches.
            original: for an answer that is put again, the passages that were candidates at its fill.
        """
        count = len(numbers)
        self._ids[row], self._lengths[row] = EMPTY, 0
        self._late[row] = _late_bits(numbers, original, self._late.shape[1])
        self._ids[row, :count] = numbers
        self._lengths[row, :count] = lengths
        start = self._starts[row] = self._allocate(len(question))
        table = self._frequencies[start : start + len(question) * self._slots].reshape(len(question), self._slots)
        table[:, :count] = frequencies
        table[:, count:] = 0
        for column, (term, repeats) in enumerate(question.items()):
            self._terms[row, column] = term
            self._repeats[row, column] = repeats
            self._holders.add(term, row, column)
        self._floors[row] = LOWEST if is_complete else 0
        self._floor_frequencies[row] = 0
        if not is_complete:
            self._floor_frequencies[row, : len(question)] = frequencies[:, -1]
            self._floor_lengths[row] = lengths[-1]
        self._postings.add_row(row, numbers)

    def original(self, row: int) -> set[int]:
        """Passages that have been candidates since the fill."""
        return _original(self._ids[row], self._late[row])

    def clear(self, row: int) -> None:
        """Clear a filled row. It takes no passages until the next ``put``."""
        terms = [int(term) for term in self._terms[row] if term]
        for column, term in enumerate(terms):
            self._holders.remove(term, row, column)
        self._free.setdefault(len(terms), []).append(int(self._starts[row]))
        self._terms[row], self._repeats[row] = 0, 0
        self._ids[row] = EMPTY
        self._floors[row] = HIGHEST

    def take_rows(self, number: int) -> Rows:
        """Rows that may contain a passage, possibly with duplicates. The caller removes it from all of them."""
        return self._postings.take(number)

    def add_rows(self, number: int, rows: Rows) -> None:
        """Record the rows that contain a passage."""
        if len(rows):
            self._postings.add(number, rows)

    def holders(self, term: int) -> Rows:
        """Questions that contain a term, as row times maximum number of terms plus column."""
        return self._holders.of(term)

    def _allocate(self, terms: int) -> int:
        if free := self._free.get(terms):
            return free.pop()
        start = self._end
        self._end += terms * self._slots
        if self._end > len(self._frequencies):
            self._frequencies = grown(self._frequencies, self._end + self._end // 4)
        return start
