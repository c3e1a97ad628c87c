"""Sources of all answers: one row per answer."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streams.core.invalidation.compiled import EMPTY, Removals
from streams.core.invalidation.rows import Postings, Rows, grown


class SourceTable:
    """Numbers and versions of the passages that answers cite, and the rows that cite a passage.

    Removed sources are found here and not among the candidates: evidence that is loaded after a removal has no
    candidate for the removed passage.

    Attributes:
        numbers: shape (rows, maximum number of sources), ``EMPTY`` where a row has fewer.
        versions: document version of each source, of the same shape.
    """

    def __init__(self) -> None:
        self.numbers = np.empty((0, 1), dtype=np.int32)
        self.versions: NDArray[np.int64] = np.empty((0, 1), dtype=np.int64)
        self._citing = Postings(lambda number, rows: (self.numbers[rows] == number).any(axis=1))

    @property
    def postings_bytes(self) -> int:
        """Size of the index from passages to rows."""
        return self._citing.size_bytes

    def grow(self, rows: int) -> None:
        """Allocate ``rows`` rows."""
        self.numbers = grown(self.numbers, rows, EMPTY)
        self.versions = grown(self.versions, rows, EMPTY)

    def put(self, row: int, numbers: Sequence[int], versions: Sequence[int]) -> None:
        """Set the sources of a row."""
        count = len(numbers)
        if count > self.numbers.shape[1]:
            more = ((0, 0), (0, count - self.numbers.shape[1]))
            self.numbers = np.pad(self.numbers, more, constant_values=EMPTY)
            self.versions = np.pad(self.versions, more, constant_values=EMPTY)
        self.numbers[row], self.versions[row] = EMPTY, EMPTY
        self.numbers[row, :count], self.versions[row, :count] = numbers, versions
        self._citing.add_row(row, numbers)

    def clear(self, row: int) -> None:
        """Remove the sources of a row."""
        self.numbers[row] = EMPTY

    def of(self, row: int) -> set[tuple[int, int]]:
        """(number, version) of each source of a row."""
        pairs = zip(self.numbers[row].tolist(), self.versions[row].tolist(), strict=True)
        return {(number, version) for number, version in pairs if number != EMPTY}

    def take_changed(self, removals: Removals) -> Rows:
        """Rows that cite a removed or rewritten passage."""
        found: list[Rows] = [np.empty(0, dtype=np.int32)]
        for number, version in zip(removals.numbers.tolist(), removals.versions.tolist(), strict=True):
            rows = np.unique(self._citing.take(number))
            cited = self.numbers[rows] == number
            changed = (cited & (self.versions[rows] != version)).any(axis=1)
            found.append(rows[changed])
            unchanged = rows[cited.any(axis=1) & ~changed]
            if len(unchanged):
                self._citing.add(number, unchanged)
        return np.unique(np.concatenate(found))
