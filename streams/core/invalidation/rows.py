"""Arrays that grow by rows, and indices from a number to the rows that hold it."""

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
    """``table`` with ``rows`` rows, the new ones filled, or left for whoever takes them to fill."""
    larger = np.empty((rows, *table.shape[1:]), dtype=table.dtype)
    larger[: len(table)] = table
    if fill is not None:
        larger[len(table) :] = fill
    return larger


class Postings:
    """For each number rows that may hold it: all that do, and some that did.

    A row is noted when it takes a number and not when it gives it up; what no longer holds it is let go now and then,
    when as much again has been noted.

    Args:
        holds: of some rows, which hold a number.
    """

    def __init__(self, holds: Callable[[int, Rows], NDArray[np.bool_]]) -> None:
        self._holds = holds
        self._noted: dict[int, array[int]] = {}
        self._compact_at: dict[int, int] = {}

    @property
    def size_bytes(self) -> int:
        """Of what is noted."""
        return sum(len(noted) * noted.itemsize for noted in self._noted.values())

    def add(self, number: int, rows: Rows) -> None:
        """Note that ``rows`` hold ``number``."""
        noted = self._noted.setdefault(number, array("i"))
        if not noted:  # They all do: nothing to let go of before as many again are noted.
            self._compact_at[number] = _COMPACT_FROM + 2 * len(rows)
        noted.frombytes(rows.tobytes())
        self._compact(number)

    def add_row(self, row: int, numbers: Iterable[int]) -> None:
        """Note that ``row`` holds ``numbers``."""
        noted, compact_at = self._noted, self._compact_at
        for number in numbers:
            rows = noted.get(number)
            if rows is None:
                noted[number] = array("i", (row,))
            else:
                rows.append(row)
                if len(rows) >= compact_at.get(number, _COMPACT_FROM):
                    self._compact(number)

    def take(self, number: int) -> Rows:
        """The rows that may hold ``number``, some of them twice; none is noted any more."""
        self._compact_at.pop(number, None)
        return np.frombuffer(self._noted.pop(number, b""), dtype=np.int32)

    def _compact(self, number: int) -> None:
        noted = self._noted[number]
        if len(noted) >= self._compact_at.get(number, _COMPACT_FROM):
            rows = np.unique(np.frombuffer(noted, dtype=np.int32))
            held = rows[self._holds(number, rows)]
            self._noted[number] = array("i", held.tobytes())
            self._compact_at[number] = _COMPACT_FROM + 2 * len(held)


class Holders:
    """For each term the rows whose questions have it, with the column in which they do; exact at any time.

    Args:
        columns: that a row has at most.
    """

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._holders: dict[int, array[int]] = {}
        self._places = np.empty((0, columns), dtype=np.int32)

    @property
    def size_bytes(self) -> int:
        """Of all of it; two numbers for each term of each question."""
        return 2 * sum(len(holders) * holders.itemsize for holders in self._holders.values())

    def grow(self, rows: int) -> None:
        """Have so many rows."""
        self._places = grown(self._places, rows)

    def add(self, term: int, row: int, column: int) -> None:
        """A row's question has a term."""
        holders = self._holders.setdefault(term, array("i"))
        self._places[row, column] = len(holders)
        holders.append(row * self._columns + column)

    def remove(self, term: int, row: int, column: int) -> None:
        """It has it no longer."""
        holders = self._holders[term]
        place, last = int(self._places[row, column]), holders.pop()
        if place < len(holders):
            holders[place] = last
            self._places[divmod(last, self._columns)] = place

    def of(self, term: int) -> Rows:
        """Rows times ``columns`` plus column; to be let go of before anything is added or removed."""
        return np.frombuffer(self._holders.get(term, b""), dtype=np.int32)
