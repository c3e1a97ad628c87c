"""Arrays that grow by rows, and the index from a number to the rows that hold it."""

from array import array
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.intp]
"""Row numbers, ascending, each once."""

NO_ROWS: Final[Rows] = np.empty(0, dtype=np.intp)

_COMPACT_FROM: Final = 64


def grown(table: NDArray[Any], rows: int, fill: float) -> NDArray[Any]:
    """``table`` with ``rows`` rows, the new ones filled."""
    more = np.full((rows - len(table), *table.shape[1:]), fill, dtype=table.dtype)
    return np.concatenate((table, more))


class Postings:
    """For each number the rows that hold it.

    A row is noted when it takes a number and not when it gives it up: reading asks which rows still hold it, and what
    no longer does is let go now and then, when as much again has been noted.

    Args:
        holds: of some rows, which hold a number.
    """

    def __init__(self, holds: Callable[[int, Rows], NDArray[np.bool_]]) -> None:
        self._holds = holds
        self._noted: dict[int, array[int]] = {}
        self._compact_at: dict[int, int] = {}

    def add(self, number: int, rows: Rows) -> None:
        """Note that ``rows`` hold ``number``."""
        noted = self._noted.setdefault(number, array("i"))
        noted.frombytes(rows.astype(np.int32).tobytes())
        self._compact(number)

    def add_one(self, number: int, row: int) -> None:
        """Note that ``row`` holds ``number``."""
        self._noted.setdefault(number, array("i")).append(row)
        self._compact(number)

    def rows(self, number: int) -> Rows:
        """The rows that hold ``number`` now."""
        noted = self._noted.get(number)
        if not noted:
            return NO_ROWS
        rows = np.unique(np.frombuffer(noted, dtype=np.int32)).astype(np.intp)
        held: Rows = rows[self._holds(number, rows)]
        return held

    def forget(self, number: int) -> None:
        """Let go of a number that no row holds any more."""
        self._noted.pop(number, None)
        self._compact_at.pop(number, None)

    def _compact(self, number: int) -> None:
        noted = self._noted[number]
        if len(noted) >= self._compact_at.get(number, _COMPACT_FROM):
            held = self.rows(number)
            self._noted[number] = array("i", held.astype(np.int32).tobytes())
            self._compact_at[number] = _COMPACT_FROM + 2 * len(held)
