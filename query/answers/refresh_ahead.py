"""Refresh-ahead: popular answers that a change invalidated are refreshed before they are next requested.

Refreshes run in the background, at a bounded rate, and only while the index has spare capacity. Each uses the access of
the original request, which is part of its cache key, so no other reader sees the answer.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

import structlog

from infra.embedding.port import EmbeddingError
from infra.opensearch.port import IndexUnavailable
from query.overload.deadline import DeadlineExceeded, deadline_in
from query.telemetry.metrics import QueryMetrics
from schemas.queries import QueryRequest
from schemas.search import Access

MAX_REMEMBERED: Final = 10_000
"""Recent questions whose answers may be refreshed."""

MAX_QUEUED: Final = 100

_log = structlog.get_logger(__name__)


class RefreshOutcome(StrEnum):
    """Result of a refresh: cached already, filled, or not stored because Redis failed or changes kept arriving."""

    CACHED = "cached"
    FILLED = "filled"
    NOT_STORED = "not_stored"


class Refresher(Protocol):
    """Fills answers."""

    async def refresh(self, request: QueryRequest, access: Access) -> RefreshOutcome:
        """Fill an answer that is not cached."""
        ...


@dataclass(frozen=True, slots=True)
class RefreshPolicy:
    """Which answers are refreshed, and how fast.

    Attributes:
        per_s: maximum refreshes per second; 0 disables them.
        min_hits: hits that the near-cache entry must have had.
        generated: whether generated answers are refreshed too. Not worth it where generation costs money.
        deadline_s: deadline of one refresh.
    """

    per_s: float
    min_hits: int
    generated: bool
    deadline_s: float


class RefreshAhead:
    """Remembers recent questions; ``run`` refreshes their answers.

    Args:
        policy: see there.
        metrics: counts refreshes.
    """

    def __init__(self, policy: RefreshPolicy, metrics: QueryMetrics) -> None:
        self._policy = policy
        self._metrics = metrics
        self._questions: OrderedDict[str, tuple[QueryRequest, Access]] = OrderedDict()
        self._queue: OrderedDict[str, None] = OrderedDict()
        self._queued = asyncio.Event()

    def on_question(self, key: str, request: QueryRequest, access: Access) -> None:
        """Remember a question."""
        if not self._policy.per_s or (request.generate and not self._policy.generated):
            return
        if request.min_position is not None:
            request = request.model_copy(update={"min_position": None})
        self._questions[key] = (request, access)
        self._questions.move_to_end(key)
        if len(self._questions) > MAX_REMEMBERED:
            self._questions.popitem(last=False)

    def on_invalidated(self, key: str, hits: int) -> None:
        """Queue an answer that a change invalidated, if it had enough hits."""
        if hits < self._policy.min_hits or key not in self._questions or key in self._queue:
            return
        if len(self._queue) >= MAX_QUEUED:
            self._metrics.refreshes.labels("queue_full").inc()
            return
        self._queue[key] = None
        self._queued.set()

    async def run(self, answers: Refresher, has_spare_capacity: Callable[[], bool]) -> None:
        """Refresh queued answers until cancelled."""
        while True:
            await self._queued.wait()
            key, _ = self._queue.popitem(last=False)
            if not self._queue:
                self._queued.clear()
            if not has_spare_capacity():
                self._metrics.refreshes.labels("busy").inc()
                continue
            question = self._questions.get(key)
            if question is None:
                continue
            await self._refresh(answers, *question)
            await asyncio.sleep(1 / self._policy.per_s)

    async def _refresh(self, answers: Refresher, request: QueryRequest, access: Access) -> None:
        try:
            async with deadline_in(self._policy.deadline_s):
                outcome = await answers.refresh(request, access)
        except (DeadlineExceeded, EmbeddingError, IndexUnavailable) as error:
            self._metrics.refreshes.labels("failed").inc()
            _log.info("refresh_failed", reason=str(error))
        except Exception:  # noqa: BLE001 - the next request fills the answer; nothing else would report the error
            self._metrics.refreshes.labels("failed").inc()
            _log.exception("refresh_failed")
        else:
            self._metrics.refreshes.labels(outcome).inc()
