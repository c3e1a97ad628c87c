"""Retry budget: bounds retries to a fraction of all calls, so that they cannot amplify an overload."""

from typing import Final

RETRY_RATIO: Final = 0.1
"""Retries per call."""

MAX_BALANCE: Final = 10.0
"""Maximum number of saved retries; also the initial balance."""


class RetryBudget:
    """Each call deposits ``RETRY_RATIO`` of a retry; each retry withdraws one."""

    def __init__(self) -> None:
        self._balance = MAX_BALANCE

    def deposit(self) -> None:
        """Record a call that is not a retry."""
        self._balance = min(MAX_BALANCE, self._balance + RETRY_RATIO)

    def withdraw(self) -> bool:
        """Take one retry from the budget; returns False if it is exhausted."""
        if self._balance < 1:
            return False
        self._balance -= 1
        return True
