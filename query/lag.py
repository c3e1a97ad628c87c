"""Whether invalidation keeps up: what is searchable is to be applied to cached answers soon after."""

import time
from collections.abc import Callable, Mapping
from typing import Final

from infra.opensearch.port import SearchIndex
from infra.redis.port import AnswerCache

OBJECTIVE_S: Final = 1.0
"""The freshness objective: a change that is searchable for longer should have dropped what it alters."""

_NO_ANSWER: Final = "0" * 32


class InvalidationLags(Exception):
    """Cached answers do not know of changes that are searchable for longer than they should be."""


class InvalidationLag:
    """Compares, for one tenant, what is searchable with what is applied.

    Being behind for a moment is how the steps work, so a difference counts only when it is still there at a later look.

    Args:
        cache: knows what is applied.
        index: knows what is searchable.
        tenant: whose changes.
        monotonic_s: a clock that only goes forward.
    """

    def __init__(
        self,
        cache: AnswerCache,
        index: SearchIndex,
        tenant: str,
        *,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._index = index
        self._tenant = tenant
        self._monotonic_s = monotonic_s
        self._expected: Mapping[int, int] = {}
        self._since_s = 0.0

    async def check(self) -> None:
        """Look once.

        Raises:
            InvalidationLags: what was searchable at a look more than ``OBJECTIVE_S`` ago is not applied yet.
            CacheUnavailable, IndexUnavailable: it cannot be told.
        """
        look = await self._cache.lookup(self._tenant, _NO_ANSWER)
        missing = {
            partition: offset
            for partition, offset in self._expected.items()
            if look.positions.get(partition, -1) < offset
        }
        now_s = self._monotonic_s()
        if missing and now_s - self._since_s > OBJECTIVE_S:
            raise InvalidationLags(
                f"changes on partitions {', '.join(map(str, sorted(missing)))} are searchable for more than "
                f"{now_s - self._since_s:.0f} s and not applied to cached answers: is `invalidate` running?"
            )
        if not missing:
            self._expected, self._since_s = await self._index.positions(self._tenant), now_s
