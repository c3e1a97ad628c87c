"""The windows of one leg, of all answers at once: one row for each answer, one column for each place, in no order.

Kept in place: what is removed leaves, what is added enters where its own score puts it, whether the index is asked or
not. A window knows down to which score it is whole, its *floor*: everything above is in it, of what is below nothing is
known. Of a window that held all there was, the floor is minus infinity. A full window that takes one more place lets go
of its lowest and rises to it.

Scores of the vector leg never change. Those of the lexical leg move with the statistics of the index, so its windows
keep what scores are made of: the frequencies of the question's terms, and the length.
"""

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from streams.core.invalidation.bm25 import Floats
from streams.core.invalidation.rows import Postings, Rows, grown

NOBODY: Final = -1
"""In the place of a passage's number where there is no passage."""

LOWEST: Final = -math.inf
HIGHEST: Final = math.inf

Flags = NDArray[np.bool_]


class VectorWindows:
    """Passages' numbers and scores."""

    def __init__(self, places: int) -> None:
        self.ids = np.empty((0, places), dtype=np.int32)
        self.floors = np.empty(0, dtype=np.float32)
        self._scores = np.empty((0, places), dtype=np.float32)
        self._postings = Postings(lambda number, rows: (self.ids[rows] == number).any(axis=1))

    def grow(self, rows: int) -> None:
        """Have so many rows."""
        self.ids = grown(self.ids, rows, NOBODY)
        self.floors = grown(self.floors, rows, HIGHEST)
        self._scores = grown(self._scores, rows, LOWEST)

    def put(self, row: int, numbers: list[int], scores: list[float], *, whole: bool) -> None:
        """Fill a row; ``whole`` where the window holds all there is."""
        self.clear(row)
        self.ids[row, : len(numbers)] = numbers
        self._scores[row, : len(scores)] = scores
        self.floors[row] = LOWEST if whole else scores[-1]
        for number in numbers:
            self._postings.add_one(number, row)

    def clear(self, row: int) -> None:
        """Empty a row; nothing enters it until it is put anew."""
        self.ids[row] = NOBODY
        self._scores[row] = LOWEST
        self.floors[row] = HIGHEST

    def scores(self, rows: Rows) -> Floats:
        """Shape (rows, places); minus infinity where there is nobody."""
        scores: Floats = self._scores[rows]
        return scores

    def remove(self, number: int) -> Rows:
        """Take a passage out of all windows; the rows that it was in."""
        rows = self._postings.rows(number)
        places = (self.ids[rows] == number).argmax(axis=1)
        self.ids[rows, places] = NOBODY
        self._scores[rows, places] = LOWEST
        self._postings.forget(number)
        return rows

    def enter(self, number: int, rows: Rows, scores: Floats, *, rank: int) -> Rows:
        """Bring a passage into the windows of ``rows`` by its score in each; those where it has ``rank`` or better."""
        above = scores > self.floors[rows]
        rows, scores = rows[above], scores[above]
        places = self._scores[rows].argmin(axis=1)
        lowest = self._scores[rows, places]
        # A place that is free has the lowest score; a window without one gives up whichever is the least.
        full = lowest > LOWEST
        self.floors[rows[full]] = np.minimum(lowest, scores)[full]
        better = scores > lowest
        rows, places = rows[better], places[better]
        self.ids[rows, places] = number
        self._scores[rows, places] = scores[better]
        self._postings.add(number, rows)
        higher = (self._scores[rows] > scores[better, None]).sum(axis=1)
        entered: Rows = rows[higher < rank]
        return entered


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A passage that is to enter lexical windows.

    Attributes:
        number: of the passage.
        length: code of its length.
        at: places among the rows at hand of those that it may enter.
        frequencies: of the terms of those, shape (at, terms).
        scores: in each of those.
    """

    number: int
    length: int
    at: Rows
    frequencies: NDArray[Any]
    scores: Floats


class LexicalWindows:
    """Passages' numbers with the frequencies of the question's terms in them and the codes of their lengths.

    Frequencies of the t-th term of each row's question are one table. Weights and norms come with each call: they are
    the statistics of that moment.
    """

    def __init__(self, places: int, terms: int) -> None:
        self.ids = np.empty((0, places), dtype=np.int32)
        self.floors = np.empty(0, dtype=np.float32)
        self._frequencies = [np.empty((0, places), dtype=np.uint8) for _ in range(terms)]
        self._lengths = np.empty((0, places), dtype=np.uint8)
        # What stood at the floor when it was set, for the floor moves with the statistics too.
        self._floor_frequencies = np.empty((0, terms), dtype=np.uint8)
        self._floor_lengths = np.empty(0, dtype=np.uint8)
        self._postings = Postings(lambda number, rows: (self.ids[rows] == number).any(axis=1))

    def grow(self, rows: int) -> None:
        """Have so many rows."""
        self.ids = grown(self.ids, rows, NOBODY)
        self.floors = grown(self.floors, rows, HIGHEST)
        self._frequencies = [grown(table, rows, 0) for table in self._frequencies]
        self._lengths = grown(self._lengths, rows, 0)
        self._floor_frequencies = grown(self._floor_frequencies, rows, 0)
        self._floor_lengths = grown(self._floor_lengths, rows, 0)

    def put(self, row: int, numbers: list[int], frequencies: NDArray[Any], lengths: list[int], *, whole: bool) -> None:
        """Fill a row; frequencies of shape (terms, places). The floor has no score before ``rescored`` gives it one."""
        self.clear(row)
        count = len(numbers)
        self.ids[row, :count] = numbers
        self._lengths[row, :count] = lengths
        for table, of_term in zip(self._frequencies, frequencies, strict=False):
            table[row, :count] = of_term
        self.floors[row] = LOWEST if whole else 0
        if not whole:
            self._floor_frequencies[row] = 0
            self._floor_frequencies[row, : len(frequencies)] = frequencies[:, -1]
            self._floor_lengths[row] = lengths[-1]
        for number in numbers:
            self._postings.add_one(number, row)

    def clear(self, row: int) -> None:
        """Empty a row; nothing enters it until it is put anew."""
        self.ids[row] = NOBODY
        self.floors[row] = HIGHEST

    def rescored(self, rows: Rows, weights: Floats, norms: Floats) -> Floats:
        """Scores by the given statistics, shape (rows, places), minus infinity where there is nobody; floors follow.

        Args:
            rows: that matter.
            weights: shape (rows, terms); zero past the last term of a row's question.
            norms: of each code of a length.
        """
        norms_of_places = norms[self._lengths[rows]]
        scores = np.zeros(norms_of_places.shape, dtype=np.float32)
        for of_term, table in zip(weights.T, self._frequencies, strict=True):
            having = np.flatnonzero(of_term)
            if len(having):
                counted = table[rows[having]].astype(np.float32)
                scores[having] += of_term[having, None] * (counted / (counted + norms_of_places[having]))
        scores[self.ids[rows] == NOBODY] = LOWEST
        counted = self._floor_frequencies[rows].astype(np.float32)
        floors = (counted / (counted + norms[self._floor_lengths[rows], None]) * weights).sum(axis=1)
        known = np.isfinite(self.floors[rows])
        self.floors[rows[known]] = floors[known]
        return scores

    def remove(self, number: int) -> Rows:
        """Take a passage out of all windows; the rows that it was in."""
        rows = self._postings.rows(number)
        places = (self.ids[rows] == number).argmax(axis=1)
        self.ids[rows, places] = NOBODY
        self._postings.forget(number)
        return rows

    def enter(self, new: Newcomer, rows: Rows, standing: Floats) -> Rows:
        """Bring a passage into windows; those of ``new.at`` that it is in now.

        Args:
            new: the passage.
            rows: at hand, floors up to date.
            standing: scores of their places, as ``rescored`` gave them; what enters is written there too.
        """
        own, length = new.scores, new.length
        above = own > self.floors[rows[new.at]]
        at: Rows = new.at[above]
        own, frequencies = own[above], new.frequencies[above]
        places = standing[at].argmin(axis=1)
        lowest = standing[at, places]
        full = lowest > LOWEST
        # Of a full window and the newcomer the least stays outside, and becomes the floor.
        ousts, stays_out = full & (lowest < own), full & (lowest >= own)
        self._floor(rows[at[stays_out]], own[stays_out], frequencies[stays_out], length)
        out, place = rows[at[ousts]], places[ousts]
        ousted = np.stack([table[out, place] for table in self._frequencies], axis=1)
        self._floor(out, lowest[ousts], ousted, self._lengths[out, place])
        at, places, own, frequencies = at[~stays_out], places[~stays_out], own[~stays_out], frequencies[~stays_out]
        entered = rows[at]
        self.ids[entered, places] = new.number
        self._lengths[entered, places] = length
        for table, of_term in zip(self._frequencies, frequencies.T, strict=True):
            table[entered, places] = of_term
        standing[at, places] = own
        self._postings.add(new.number, entered)
        return at

    def _floor(self, rows: Rows, scores: Floats, frequencies: NDArray[Any], length: Any) -> None:
        self.floors[rows] = scores
        self._floor_frequencies[rows] = frequencies
        self._floor_lengths[rows] = length
