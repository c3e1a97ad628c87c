"""The windows of one leg, of all answers at once: one row for each answer, one column for each place, in no order.

Kept in place: what is removed leaves, what is added enters where its own score puts it, whether the index is asked or
not (``compiled``). A window knows down to which score it is whole, its *floor*: everything above is in it, of what is
below nothing is known. Of a window that held all there was, the floor is minus infinity. A full window that takes one
more place lets go of its lowest and rises to it.

Scores of the vector leg never change. Those of the lexical leg move with the statistics of the index, so its windows
keep what scores are made of: the frequencies of the question's terms, and the length.
"""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from streams.core.invalidation.compiled import NOBODY, LexicalLeg, VectorLeg
from streams.core.invalidation.rows import Holders, Postings, Rows, grown

LOWEST: Final = -math.inf
HIGHEST: Final = math.inf

_BITS: Final = 64


def _bits(places: int) -> NDArray[np.uint64]:
    return np.empty((0, -(-places // _BITS)), dtype=np.uint64)


def _late(numbers: list[int], settled: set[int] | None, words: int) -> NDArray[np.uint64]:
    """Bits of the places of what entered after an answer was made; of a new answer that is nothing."""
    bits = np.zeros(words * _BITS, dtype=np.uint8)
    if settled is not None:
        bits[: len(numbers)] = [number not in settled for number in numbers]
    return np.packbits(bits, bitorder="little").view(np.uint64)


def _settled(ids: NDArray[np.int32], late: NDArray[np.uint64]) -> set[int]:
    entered = np.unpackbits(late.view(np.uint8), bitorder="little")[: len(ids)]
    return set(ids[(entered == 0) & (ids != NOBODY)].tolist())


class VectorWindows:
    """Passages' numbers and scores."""

    def __init__(self, places: int) -> None:
        self._ids = np.empty((0, places), dtype=np.int32)
        self._scores = np.empty((0, places), dtype=np.float32)
        self._late = _bits(places)
        self._floors = np.empty(0, dtype=np.float32)
        self._postings = Postings(lambda number, rows: (self._ids[rows] == number).any(axis=1))

    @property
    def leg(self) -> VectorLeg:
        """The arrays, until ``grow``."""
        return VectorLeg(self._ids, self._scores, self._late, self._floors)

    def size_bytes(self, share: float) -> int:
        """Of a share of the rows, with the index of passages."""
        return round(share * sum(table.nbytes for table in self.leg)) + self._postings.size_bytes

    def grow(self, rows: int) -> None:
        """Have so many rows."""
        self._ids = grown(self._ids, rows)
        self._scores = grown(self._scores, rows)
        self._late = grown(self._late, rows)
        self._floors = grown(self._floors, rows, HIGHEST)

    def put(
        self, row: int, numbers: list[int], scores: list[float], *, whole: bool, settled: set[int] | None = None
    ) -> None:
        """Fill a row.

        Args:
            row: to fill.
            numbers: of the passages, best first.
            scores: of those.
            whole: the window holds all there is.
            settled: of an answer that is put again, the passages that were in this window when it was made.
        """
        self._ids[row], self._scores[row] = NOBODY, LOWEST
        self._late[row] = _late(numbers, settled, self._late.shape[1])
        self._ids[row, : len(numbers)] = numbers
        self._scores[row, : len(scores)] = scores
        self._floors[row] = LOWEST if whole else scores[-1]
        self._postings.add_row(row, numbers)

    def settled(self, row: int) -> set[int]:
        """Passages that are in a window since the answer was made."""
        return _settled(self._ids[row], self._late[row])

    def clear(self, row: int) -> None:
        """Empty a row; nothing enters it until it is put anew."""
        self._ids[row] = NOBODY
        self._floors[row] = HIGHEST

    def take_out(self, number: int) -> Rows:
        """The rows that may hold a passage, some of them twice; it is to leave them all."""
        return self._postings.take(number)

    def entered(self, number: int, rows: Rows) -> None:
        """Note in which rows a passage is now."""
        if len(rows):
            self._postings.add(number, rows)


class LexicalWindows:
    """Passages' numbers with the frequencies of the question's terms in them and the codes of their lengths.

    Args:
        places: of each window.
        terms: that a question has at most.
    """

    def __init__(self, places: int, terms: int) -> None:
        self._places = places
        self._ids = np.empty((0, places), dtype=np.int32)
        self._lengths = np.empty((0, places), dtype=np.uint8)
        self._late = _bits(places)
        self._floors = np.empty(0, dtype=np.float32)
        # A row has as many as its question's terms ask for; what rows have left is taken again by those of as many.
        self._frequencies = np.empty(0, dtype=np.uint16)
        self._starts = np.empty(0, dtype=np.int64)
        self._end = 0
        self._spare: dict[int, list[int]] = {}
        # What stood at the floor when it was set, for the floor moves with the statistics too.
        self._floor_frequencies = np.empty((0, terms), dtype=np.uint16)
        self._floor_lengths = np.empty(0, dtype=np.uint8)
        self._terms = np.empty((0, terms), dtype=np.int32)
        self._repeats = np.empty((0, terms), dtype=np.float32)
        self._holders = Holders(terms)
        self._postings = Postings(lambda number, rows: (self._ids[rows] == number).any(axis=1))

    @property
    def leg(self) -> LexicalLeg:
        """The arrays, until ``grow`` or ``put``."""
        return LexicalLeg(
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

    def size_bytes(self, share: float) -> int:
        """Of a share of the rows, with the indices of passages and terms."""
        tables = sum(table.nbytes for table in self.leg) - self._frequencies.nbytes
        frequencies = self._end * self._frequencies.itemsize
        return round(share * tables) + frequencies + self._postings.size_bytes + self._holders.size_bytes

    def grow(self, rows: int) -> None:
        """Have so many rows."""
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
        whole: bool,
        settled: set[int] | None = None,
    ) -> None:
        """Fill a row that is clear. Its floor has no score before floors move.

        Args:
            row: to fill.
            question: its terms, each with how often it is asked.
            numbers: of the passages, best first.
            frequencies: of the terms in them, shape (terms, passages).
            lengths: codes of theirs.
            whole: the window holds all there is.
            settled: of an answer that is put again, the passages that were in this window when it was made.
        """
        count = len(numbers)
        self._ids[row], self._lengths[row] = NOBODY, 0
        self._late[row] = _late(numbers, settled, self._late.shape[1])
        self._ids[row, :count] = numbers
        self._lengths[row, :count] = lengths
        start = self._starts[row] = self._take(len(question))
        table = self._frequencies[start : start + len(question) * self._places].reshape(len(question), self._places)
        table[:, :count] = frequencies
        table[:, count:] = 0
        for column, (term, repeats) in enumerate(question.items()):
            self._terms[row, column] = term
            self._repeats[row, column] = repeats
            self._holders.add(term, row, column)
        self._floors[row] = LOWEST if whole else 0
        self._floor_frequencies[row] = 0
        if not whole:
            self._floor_frequencies[row, : len(question)] = frequencies[:, -1]
            self._floor_lengths[row] = lengths[-1]
        self._postings.add_row(row, numbers)

    def settled(self, row: int) -> set[int]:
        """Passages that are in a window since the answer was made."""
        return _settled(self._ids[row], self._late[row])

    def clear(self, row: int) -> None:
        """Empty a row that was put; nothing enters it until it is put anew."""
        terms = [int(term) for term in self._terms[row] if term]
        for column, term in enumerate(terms):
            self._holders.remove(term, row, column)
        self._spare.setdefault(len(terms), []).append(int(self._starts[row]))
        self._terms[row], self._repeats[row] = 0, 0
        self._ids[row] = NOBODY
        self._floors[row] = HIGHEST

    def take_out(self, number: int) -> Rows:
        """The rows that may hold a passage, some of them twice; it is to leave them all."""
        return self._postings.take(number)

    def entered(self, number: int, rows: Rows) -> None:
        """Note in which rows a passage is now."""
        if len(rows):
            self._postings.add(number, rows)

    def holders(self, term: int) -> Rows:
        """Whose questions have a term: rows times the most terms plus the column."""
        return self._holders.of(term)

    def _take(self, terms: int) -> int:
        if spare := self._spare.get(terms):
            return spare.pop()
        start = self._end
        self._end += terms * self._places
        if self._end > len(self._frequencies):
            self._frequencies = grown(self._frequencies, self._end + self._end // 4)
        return start
