"""How many questions are retrieved at a time, and whose turn it is. Pure: times are arguments.

The limit follows what the stores can do: it grows by one for each round of questions that were answered within the
target, and shrinks by a tenth for each round that was not (additive increase, multiplicative decrease). A round is as
many answers as the limit allows at a time. It does not grow while there is no demand for it.
"""

import math
from collections import OrderedDict, deque
from typing import Final, Generic, TypeVar

T = TypeVar("T")

_LESS: Final = 0.9

_SHORTEST_MS: Final = 1.0
"""Nothing is retrieved in less."""


class AdaptiveLimit:
    """Additive increase, multiplicative decrease.

    Args:
        target_ms: time of one retrieval up to which more at a time are tried.
        least: the limit never falls below this.
        most: the limit never rises above this.
        first: where it begins.

    Attributes:
        mean_ms: time of one retrieval in the last round; the target before there was one.
        at_a_time: most that were under way in it.
    """

    def __init__(self, *, target_ms: float, least: int, most: int, first: int) -> None:
        if not 1 <= least <= first <= most:
            raise ValueError(f"1 <= {least} <= {first} <= {most} does not hold")
        self.mean_ms = self._target_ms = target_ms
        self.at_a_time = 0
        self._least = least
        self._most = most
        self._limit = float(first)
        self._answers = 0
        self._sum_ms = 0.0
        self._busiest = 0

    @property
    def now(self) -> int:
        """How many at a time."""
        return int(self._limit)

    def note(self, took_ms: float, *, at_a_time: int, failed: bool = False) -> None:
        """One has ended.

        Args:
            took_ms: from its admission to its end.
            at_a_time: how many were under way, itself included.
            failed: the store did not answer in time, or refused: as bad as a whole round that was too slow.
        """
        self._answers += 1
        self._sum_ms += took_ms
        self._busiest = max(self._busiest, at_a_time)
        if not failed and self._answers < self.now:
            return
        self.mean_ms, self.at_a_time = self._sum_ms / self._answers, self._busiest
        if failed or self.mean_ms > self._target_ms:
            self._limit = max(float(self._least), self._limit * _LESS)
        elif self._busiest >= self.now:
            self._limit = min(float(self._most), self._limit + 1.0)
        self._answers, self._sum_ms, self._busiest = 0, 0.0, 0


class FairQueue(Generic[T]):
    """Who waits: each tenant in its own line, one of each line in turn."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[T]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def waiting(self, tenant: str) -> int:
        """How many of this tenant wait."""
        return len(self._lines.get(tenant, ()))

    @property
    def tenants(self) -> int:
        """How many tenants wait."""
        return len(self._lines)

    def add(self, tenant: str, one: T) -> None:
        """Wait at the end of the tenant's line."""
        self._lines.setdefault(tenant, deque()).append(one)
        self._count += 1

    def take(self) -> T | None:
        """The next: the first of the line whose turn it is; its tenant's next turn is after all others'."""
        if not self._lines:
            return None
        tenant, line = self._lines.popitem(last=False)
        one = line.popleft()
        self._count -= 1
        if line:
            self._lines[tenant] = line
        return one

    def remove(self, tenant: str, one: T) -> None:
        """No longer wait; nothing happens where it does not."""
        line = self._lines.get(tenant)
        if line is None or one not in line:
            return
        line.remove(one)
        self._count -= 1
        if not line:
            del self._lines[tenant]


def places_in_line(limit: int, tenants: int, *, wait_ms: float, mean_ms: float) -> int:
    """How many of one tenant may wait: as many as are answered in some time, shared by all tenants that wait.

    Args:
        limit: how many are retrieved at a time.
        tenants: how many wait, this one included.
        wait_ms: longest wait.
        mean_ms: time of one retrieval.
    """
    return max(1, math.ceil(limit * wait_ms / max(_SHORTEST_MS, mean_ms) / max(1, tenants)))
