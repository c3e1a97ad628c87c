"""How much one tenant may ask of a process, so that the others get their share."""

import math
import time
from typing import Final

from limits import RateLimitItem, RateLimitItemPerMinute, RateLimitItemPerSecond
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

_LEAST_RETRY_S: Final = 1.0


class OverLimit(Exception):
    """A tenant has had its share for now.

    Attributes:
        retry_after_s: when there may be more.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TenantLimit:
    """A rate for each tenant, over a sliding window, in this process alone: no request waits for a store to be counted.

    Args:
        what: is limited, for people.
        per_second: how many; 0 sets no limit.
        per_minute: the same for a minute; one of both.
    """

    def __init__(self, what: str, *, per_second: int = 0, per_minute: int = 0) -> None:
        self._what = what
        self._item: RateLimitItem | None = None
        if per_second:
            self._item = RateLimitItemPerSecond(per_second)
        elif per_minute:
            self._item = RateLimitItemPerMinute(per_minute)
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def take(self, tenant: str, cost: int = 1) -> None:
        """Count ``cost`` for the tenant.

        Raises:
            OverLimit: that would be more than its share; nothing is counted.
        """
        if self._item is None or self._limiter.hit(self._item, tenant, cost=cost):
            return
        resets_s = self._limiter.get_window_stats(self._item, tenant).reset_time - time.time()
        raise OverLimit(
            f"the limit of each tenant is {self._item.amount} {self._what}",
            retry_after_s=math.ceil(max(_LEAST_RETRY_S, resets_s)),
        )
