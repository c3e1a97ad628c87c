"""Adaptive concurrency limit, and a queue that is fair between tenants. Pure: times are arguments.

Additive increase, multiplicative decrease: the limit grows by one after a round whose mean latency met the target, and
shrinks by a tenth after one that did not. A round is as many retrievals as the limit allows concurrently. The limit
grows only if it was reached.
"""

import math
from collections import OrderedDict, deque
from typing import Final, Generic, TypeVar

T = TypeVar("T")

_DECREASE: Final = 0.9

_MIN_LATENCY_MS: Final = 1.0
"""Lower bound of the latency in queue estimates."""


class AdaptiveLimit:
    """Concurrency limit that follows the capacity of a store.

    Args:
        target_ms: target latency of one retrieval.
        min_limit: lower bound.
        max_limit: upper bound.
        initial_limit: initial value.

    Attributes:
        mean_ms: mean latency of the last round; the target before the first.
        peak_in_flight: highest concurrency of the last round.
    """

    def __init__(self, *, target_ms: float, min_limit: int, max_limit: int, initial_limit: int) -> None:
        if not 1 <= min_limit <= initial_limit <= max_limit:
            raise ValueError(f"1 <= {min_limit} <= {initial_limit} <= {max_limit} does not hold")
        self.mean_ms = self._target_ms = target_ms
        self.peak_in_flight = 0
        self._min_limit = min_limit
        self._max_limit = max_limit
        self._limit = float(initial_limit)
        self._samples = 0
        self._sum_ms = 0.0
        self._round_peak = 0

    @property
    def current(self) -> int:
        """Current limit."""
        return int(self._limit)

    def record(self, took_ms: float, *, in_flight: int, failed: bool = False) -> None:
        """Record the end of a retrieval.

        Args:
            took_ms: time since its admission.
            in_flight: retrievals in flight, including this one.
            failed: True if the store timed out or rejected it. Ends the round with a decrease.
        """
        self._samples += 1
        self._sum_ms += took_ms
        self._round_peak = max(self._round_peak, in_flight)
        if not failed and self._samples < self.current:
            return
        self.mean_ms, self.peak_in_flight = self._sum_ms / self._samples, self._round_peak
        if failed or self.mean_ms > self._target_ms:
            self._limit = max(float(self._min_limit), self._limit * _DECREASE)
        elif self._round_peak >= self.current:
            self._limit = min(float(self._max_limit), self._limit + 1.0)
        self._samples, self._sum_ms, self._round_peak = 0, 0.0, 0


class FairQueue(Generic[T]):
    """Round-robin over tenants, FIFO within each tenant."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def queued(self, tenant: str) -> int:
        """Number of queued items of the tenant."""
        return len(self._queues.get(tenant, ()))

    @property
    def tenants(self) -> int:
        """Number of tenants with queued items."""
        return len(self._queues)

    def push(self, tenant: str, item: T) -> None:
        """Append an item to the tenant's queue."""
        self._queues.setdefault(tenant, deque()).append(item)
        self._size += 1

    def pop(self) -> T | None:
        """Remove and return the next item, or None. Its tenant moves to the end of the rotation."""
        if not self._queues:
            return None
        tenant, queue = self._queues.popitem(last=False)
        item = queue.popleft()
        self._size -= 1
        if queue:
            self._queues[tenant] = queue
        return item

    def remove(self, tenant: str, item: T) -> None:
        """Remove an item if it is queued."""
        queue = self._queues.get(tenant)
        if queue is None or item not in queue:
            return
        queue.remove(item)
        self._size -= 1
        if not queue:
            del self._queues[tenant]


def max_queued_per_tenant(limit: int, tenants: int, *, max_wait_ms: float, mean_ms: float) -> int:
    """Queue bound of one tenant: the retrievals that complete within the longest wait, divided between tenants.

    Args:
        limit: concurrent retrievals.
        tenants: tenants with queued retrievals, including this one.
        max_wait_ms: longest wait in the queue.
        mean_ms: mean latency of one retrieval.
    """
    return max(1, math.ceil(limit * max_wait_ms / max(_MIN_LATENCY_MS, mean_ms) / max(1, tenants)))
