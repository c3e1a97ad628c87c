"""Growing arrays, and indices from a number to the rows that contain it."""

from array import array
from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int32]
"""Row numbers."""

NO_ROWS: Final[Rows] = np.empty(0, dtype=np.int32)

_COMPACT_FROM: Final = 64


def grown(table: NDArray[Any], rows: int, fill: float | None = None) -> NDArray[Any]:
    """``table`` with ``rows`` rows. New rows contain ``fill``, or are uninitialised without it."""
    larger = np.empty((rows, *table.shape[1:]), dtype=table.dtype)
    larger[: len(table)] = table
    if fill is not None:
        larger[len(table) :] = fill
    return larger


class Postings:
    """For each number, a superset of the rows that contain it.

    A row is added when it takes a number, and not removed when it loses the number. Rows that no longer contain it are
    removed when the list has doubled.

    Args:
        holds: which of the given rows contain a number.
    """

    def __init__(self, holds: Callable[[int, Rows], NDArray[np.bool_]]) -> None:
        self._holds = holds
        self._rows: dict[int, array[int]] = {}
        self._compact_at: dict[int, int] = {}

    @property
    def size_bytes(self) -> int:
        """Size of the row lists."""
        return sum(len(rows) * rows.itemsize for rows in self._rows.values())

    def add(self, number: int, rows: Rows) -> None:
        """Add rows that contain ``number``."""
        listed = self._rows.setdefault(number, array("i"))
        if not listed:  # All rows contain it: nothing to remove before the list has doubled.
            self._compact_at[number] = _COMPACT_FROM + 2 * len(rows)
        listed.frombytes(rows.tobytes())
        self._compact(number)

    def add_row(self, row: int, numbers: Iterable[int]) -> None:
        """Add a row that contains ``numbers``."""
        by_number, compact_at = self._rows, self._compact_at
        for number in numbers:
            rows = by_number.get(number)
            if rows is None:
                by_number[number] = array("i", (row,))
            else:
                rows.append(row)
                if len(rows) >= compact_at.get(number, _COMPACT_FROM):
                    self._compact(number)

    def take(self, number: int) -> Rows:
        """Remove and return the rows that may contain ``number``, possibly with duplicates."""
        self._compact_at.pop(number, None)
        return np.frombuffer(self._rows.pop(number, b""), dtype=np.int32)

    def _compact(self, number: int) -> None:
        listed = self._rows[number]
        if len(listed) >= self._compact_at.get(number, _COMPACT_FROM):
            rows = np.unique(np.frombuffer(listed, dtype=np.int32))
            held = rows[self._holds(number, rows)]
            self._rows[number] = array("i", held.tobytes())
            self._compact_at[number] = _COMPACT_FROM + 2 * len(held)


class Holders:
    """For each term, the rows and columns of the questions that contain it. Always exact.

    Args:
        columns: maximum number of terms of a question.
    """

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._holders: dict[int, array[int]] = {}
        self._positions = np.empty((0, columns), dtype=np.int32)

    @property
    def size_bytes(self) -> int:
        """Size of all lists: two numbers for each term of each question."""
        return 2 * sum(len(holders) * holders.itemsize for holders in self._holders.values())

    def grow(self, rows: int) -> None:
        """Grow to ``rows`` rows."""
        self._positions = grown(self._positions, rows)

    def add(self, term: int, row: int, column: int) -> None:
        """Add a term of a row's question."""
        holders = self._holders.setdefault(term, array("i"))
        self._positions[row, column] = len(holders)
        holders.append(row * self._columns + column)

    def remove(self, term: int, row: int, column: int) -> None:
        """Remove a term of a row's question."""
        holders = self._holders[term]
        position, last = int(self._positions[row, column]), holders.pop()
        if position < len(holders):
            holders[position] = last
            self._positions[divmod(last, self._columns)] = position

    def of(self, term: int) -> Rows:
        """Positions of a term, as row times ``columns`` plus column; valid until the next ``add`` or ``remove``."""
        return np.frombuffer(self._holders.get(term, b""), dtype=np.int32)
