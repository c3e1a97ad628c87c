"""Answers that many asked for are retrieved again when a change drops them, before the next one asks.

In the background, a few in a second, and only while the index has room. With the access that the answer was asked with,
which is part of its key: nobody else gets it.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from enum import StrEnum
from typing import Final, Protocol

import structlog

from infra.embedding.port import EmbeddingError
from infra.opensearch.port import IndexUnavailable
from query.overload.deadline import DeadlineExceeded, deadline_in
from query.telemetry.metrics import QueryMetrics
from schemas.queries import QueryRequest
from schemas.search import Access

REMEMBERED: Final = 10_000
"""Questions whose answers may be wanted again."""

WAITING: Final = 100

_log = structlog.get_logger(__name__)


class RefreshOutcome(StrEnum):
    """How it went: there already, filled, or not kept, because the cache fails or changes came all the time."""

    THERE = "there"
    FILLED = "filled"
    UNKEPT = "unkept"


class AnswerFiller(Protocol):
    """What fills answers."""

    async def refill(self, request: QueryRequest, access: Access) -> RefreshOutcome:
        """Fill an answer that is not there."""
        ...


class RefreshAhead:
    """Remembers who asked what; ``run`` does the work.

    Args:
        per_s: most answers in a second; 0 fills none.
        hits: times that a copy of an answer must have been served by this process.
        written: whether answers with a text are filled too: where texts cost, nobody has asked for these.
        deadline_s: of one answer.
        metrics: where they are counted.
    """

    def __init__(self, *, per_s: float, hits: int, written: bool, deadline_s: float, metrics: QueryMetrics) -> None:
        self._per_s = per_s
        self._hits = hits
        self._written = written
        self._deadline_s = deadline_s
        self._metrics = metrics
        self._asked: OrderedDict[str, tuple[QueryRequest, Access]] = OrderedDict()
        self._waiting: OrderedDict[str, None] = OrderedDict()
        self._wakes = asyncio.Event()

    def asked(self, key: str, request: QueryRequest, access: Access) -> None:
        """An answer was asked for."""
        if not self._per_s or (request.generate and not self._written):
            return
        if request.min_position is not None:
            request = request.model_copy(update={"min_position": None})
        self._asked[key] = (request, access)
        self._asked.move_to_end(key)
        if len(self._asked) > REMEMBERED:
            self._asked.popitem(last=False)

    def dropped(self, key: str, hits: int) -> None:
        """A change has dropped an answer that this process had served so often."""
        if hits < self._hits or key not in self._asked or key in self._waiting:
            return
        if len(self._waiting) >= WAITING:
            self._metrics.refills.labels("full").inc()
            return
        self._waiting[key] = None
        self._wakes.set()

    async def run(self, answers: AnswerFiller, has_room: Callable[[], bool]) -> None:
        """Fill what was dropped, until cancelled."""
        while True:
            await self._wakes.wait()
            key, _ = self._waiting.popitem(last=False)
            if not self._waiting:
                self._wakes.clear()
            if not has_room():
                self._metrics.refills.labels("busy").inc()
                continue
            asked = self._asked.get(key)
            if asked is None:
                continue
            await self._fill(answers, *asked)
            await asyncio.sleep(1 / self._per_s)

    async def _fill(self, answers: AnswerFiller, request: QueryRequest, access: Access) -> None:
        try:
            async with deadline_in(self._deadline_s):
                refilled = await answers.refill(request, access)
        except (DeadlineExceeded, EmbeddingError, IndexUnavailable) as error:
            self._metrics.refills.labels("failed").inc()
            _log.info("not_refilled", reason=str(error))
        except Exception:  # noqa: BLE001 - whoever asks next fills it, and nobody else would tell
            self._metrics.refills.labels("failed").inc()
            _log.exception("refill_failed")
        else:
            self._metrics.refills.labels(refilled).inc()
