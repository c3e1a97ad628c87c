"""Rate limits per tenant."""

import math
import time
from typing import Final

from limits import RateLimitItem, RateLimitItemPerMinute, RateLimitItemPerSecond
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

_MIN_RETRY_S: Final = 1.0


class OverLimit(Exception):
    """A tenant exceeds its rate limit.

    Attributes:
        retry_after_s: seconds to wait.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TenantLimit:
    """Rate limit per tenant over a sliding window. Each process counts for itself, so no request waits for a store.

    Args:
        unit: what is limited, for error messages.
        per_second: limit per second; 0 for none.
        per_minute: limit per minute instead; 0 for none.
    """

    def __init__(self, unit: str, *, per_second: int = 0, per_minute: int = 0) -> None:
        self._unit = unit
        self._item: RateLimitItem | None = None
        if per_second:
            self._item = RateLimitItemPerSecond(per_second)
        elif per_minute:
            self._item = RateLimitItemPerMinute(per_minute)
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def take(self, tenant: str, cost: int = 1) -> None:
        """Count ``cost`` for a tenant.

        Raises:
            OverLimit: the limit would be exceeded; nothing is counted.
        """
        if self._item is None or self._limiter.hit(self._item, tenant, cost=cost):
            return
        resets_s = self._limiter.get_window_stats(self._item, tenant).reset_time - time.time()
        raise OverLimit(
            f"the limit per tenant is {self._item.amount} {self._unit}",
            retry_after_s=math.ceil(max(_MIN_RETRY_S, resets_s)),
        )
