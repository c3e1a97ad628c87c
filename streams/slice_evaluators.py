"""The evaluators of a worker."""

import asyncio
import time
from collections import defaultdict
from typing import Final

import structlog

from infra.opensearch.port import SearchIndex, TermIndex
from infra.redis.port import AnswerSlices, CacheUnavailable
from infra.settings import AnswerSettings
from streams.evaluation import EvaluationContext, FusionParameters, SliceEvaluator

LOAD_INTERVAL_S: Final = 0.1
"""Interval at which an evaluator loads new answers between changes. Most answers are then loaded before the next
change."""

QUIET_LOAD_INTERVAL_S: Final = 2.0
"""The same for a slice without activity for ``QUIET_AFTER_S``."""

QUIET_AFTER_S: Final = 10.0

_log = structlog.get_logger(__name__)


class SliceEvaluators:
    """The evaluators of this worker: one for each slice that received a change."""

    def __init__(
        self,
        slices: AnswerSlices,
        index: SearchIndex,
        terms: TermIndex,
        *,
        fusion: FusionParameters,
        settings: AnswerSettings,
    ) -> None:
        self._context = EvaluationContext.of(slices, index, terms, fusion=fusion, settings=settings)
        self._evaluators: dict[tuple[str, int], SliceEvaluator] = {}

    def prefetch(self, tenant: str, encoded: bytes) -> None:
        """Start to load a change while it is appended to the slices."""
        if any(name == tenant for name, _ in self._evaluators):
            self._context.loader.prefetch(tenant, (encoded,))

    async def catch_up(self, tenant: str, number: int) -> None:
        """Evaluate a slice up to its latest change; errors as for ``SliceEvaluator.catch_up``."""
        evaluator = self._evaluators.get((tenant, number))
        if evaluator is None:
            evaluator = self._evaluators[tenant, number] = SliceEvaluator(self._context, tenant, number)
        await evaluator.catch_up()

    async def follow(self) -> None:
        """Load new answers until cancelled, so that the next change finds little to load."""
        loaded_s: dict[tuple[str, int], float] = {}
        while True:
            await asyncio.sleep(LOAD_INTERVAL_S)
            now_s = time.monotonic()
            due: dict[str, list[SliceEvaluator]] = defaultdict(list)
            for slice_id, evaluator in self._evaluators.items():
                if (
                    now_s - evaluator.active_s <= QUIET_AFTER_S
                    or now_s - loaded_s.get(slice_id, 0.0) >= QUIET_LOAD_INTERVAL_S
                ):
                    loaded_s[slice_id] = now_s
                    due[slice_id[0]].append(evaluator)
            for tenant, evaluators in due.items():
                # Concurrently, so that their requests to Redis and the index are batched.
                results = await asyncio.gather(
                    *(evaluator.catch_up() for evaluator in evaluators), return_exceptions=True
                )
                for error in filter(None, results):
                    if isinstance(error, CacheUnavailable):
                        _log.warning("evaluator_waiting_for_redis", tenant=tenant, reason=str(error))
                    else:
                        # No caller awaits this round, so the error is only logged. The next change meets the same
                        # cause.
                        _log.error("evaluation_failed", tenant=tenant, exc_info=error)

    async def close(self) -> None:
        """Cancel pending reads."""
        await self._context.loader.close()
