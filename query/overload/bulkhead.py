"""What stands before each store: a bulkhead, a circuit breaker, and a limit of time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import structlog
from interlock import CircuitBreaker, CircuitOpenError, Config, CoreEventListener, FailureClassifier, State

from query.telemetry.metrics import QueryMetrics

_OPEN_S: Final = 1.0
_LONGEST_OPEN_S: Final = 10.0
_BREAKER: Final = Config(
    failure_rate_threshold=0.5,
    minimum_number_of_calls=10,
    window_size=20,
    wait_duration_in_open=_OPEN_S,
    wait_duration_backoff_multiplier=2.0,
    wait_duration_in_open_max=_LONGEST_OPEN_S,
    permitted_calls_in_half_open=2,
    max_concurrent_probes=1,
)
"""Half of the last twenty calls failed: leave it alone for a second, then try with one call, and wait longer each time
that fails."""

_log = structlog.get_logger(__name__)


class NotAdmitted(Exception):
    """A call was not made at all.

    Attributes:
        retry_after_s: when it may be.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Bulkhead:
    """Lets calls to one store pass, a few at a time, and none while it is down.

    Args:
        store: its name.
        places: calls at a time: as many as it has connections.
        metrics: where refusals and the breaker's state are told.
        harmless: exceptions that say nothing against the store.
    """

    def __init__(
        self, store: str, *, places: int, metrics: QueryMetrics, harmless: tuple[type[Exception], ...] = ()
    ) -> None:
        self._store = store
        self._places = asyncio.Semaphore(places)
        self._metrics = metrics
        self._breaker = CircuitBreaker(
            name=store, config=_BREAKER, listener=_Told(metrics), classifier=_Failures(harmless)
        )
        metrics.breaker_open.labels(store).set(0)

    @asynccontextmanager
    async def admitted(self, *, queue_s: float, limit_s: float) -> AsyncIterator[None]:
        """Make a call in it. Exceptions in it count against the store, unless harmless; cancellation does not.

        Args:
            queue_s: longest wait for a place.
            limit_s: longest call.

        Raises:
            NotAdmitted: the store is down, or no place became free.
            TimeoutError: the call took too long.
        """
        try:
            async with asyncio.timeout(queue_s):
                await self._places.acquire()
        except TimeoutError:
            raise self._refused("full", f"no free place for {self._store}", _OPEN_S) from None
        try:
            async with self._breaker, asyncio.timeout(limit_s):
                yield
        except CircuitOpenError as error:
            raise self._refused("open", f"{self._store} is down", error.retry_after or _OPEN_S) from error
        finally:
            self._places.release()

    async def check(self) -> None:
        """Raise ``NotAdmitted`` while calls are refused; makes none."""
        if self._breaker.state is State.OPEN:
            raise NotAdmitted(f"{self._store} is down: most of its last calls failed", retry_after_s=_OPEN_S)

    def _refused(self, reason: str, message: str, retry_after_s: float) -> NotAdmitted:
        self._metrics.not_admitted.labels(self._store, reason).inc()
        return NotAdmitted(message, retry_after_s=retry_after_s)


class _Failures(FailureClassifier):
    """Every exception but the harmless ones."""

    def __init__(self, harmless: tuple[type[Exception], ...]) -> None:
        self._harmless = harmless

    def is_failure(self, *, result: object, exception: Exception | None) -> bool:  # noqa: ARG002 - the protocol's
        return exception is not None and not isinstance(exception, self._harmless)


class _Told(CoreEventListener):
    """Tells of a breaker's changes."""

    def __init__(self, metrics: QueryMetrics) -> None:
        self._metrics = metrics

    def on_state_change(self, *, name: str, old: State, new: State) -> None:
        self._metrics.breaker_open.labels(name).set(new is not State.CLOSED)
        _log.warning("breaker", store=name, was=str(old), now=str(new))
