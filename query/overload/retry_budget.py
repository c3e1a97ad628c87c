"""How many calls may be repeated: a share of all, so that repeating never makes an overload worse."""

from typing import Final

SHARE: Final = 0.1
"""Repetitions for each first try."""

MOST: Final = 10.0
"""Repetitions that may be saved up."""


class RetryBudget:
    """Saves a share of a repetition with each call, and spends one with each repetition."""

    def __init__(self) -> None:
        self._saved = MOST

    def note_call(self) -> None:
        """A first try was made."""
        self._saved = min(MOST, self._saved + SHARE)

    def take(self) -> bool:
        """True if a call may be repeated, which is then paid for."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True
