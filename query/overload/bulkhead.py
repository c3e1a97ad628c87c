"""Bulkhead, circuit breaker and timeout in front of a store."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import structlog
from interlock import CircuitBreaker, CircuitOpenError, Config, CoreEventListener, FailureClassifier, State
from typing_extensions import override

from query.telemetry.metrics import QueryMetrics

_OPEN_S: Final = 1.0
_MAX_OPEN_S: Final = 10.0
_BREAKER: Final = Config(
    failure_rate_threshold=0.5,
    minimum_number_of_calls=10,
    window_size=20,
    wait_duration_in_open=_OPEN_S,
    wait_duration_backoff_multiplier=2.0,
    wait_duration_in_open_max=_MAX_OPEN_S,
    permitted_calls_in_half_open=2,
    max_concurrent_probes=1,
)
"""Opens when half of the last 20 calls failed. Probes with one call after a second, then with exponential backoff."""

_log = structlog.get_logger(__name__)


class CallRejected(Exception):
    """The call was rejected before it was made.

    Attributes:
        retry_after_s: seconds until a retry may succeed.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Bulkhead:
    """Bounds concurrent calls to one store and rejects calls while its circuit breaker is open.

    Args:
        store: name of the store.
        slots: concurrent calls; the number of connections.
        metrics: counts rejections and exports the state of the breaker.
        ignored: exceptions that do not count as failures of the store.
    """

    def __init__(
        self, store: str, *, slots: int, metrics: QueryMetrics, ignored: tuple[type[Exception], ...] = ()
    ) -> None:
        self._store = store
        self._slots = asyncio.Semaphore(slots)
        self._metrics = metrics
        self._breaker = CircuitBreaker(
            name=store, config=_BREAKER, listener=_StateListener(metrics), classifier=_Failures(ignored)
        )
        metrics.circuit_breaker_open.labels(store).set(0)

    @asynccontextmanager
    async def admitted(self, *, queue_s: float, timeout_s: float) -> AsyncIterator[None]:
        """Make a call. Its exceptions count as failures of the store unless ignored; cancellation does not.

        Args:
            queue_s: longest wait for a slot.
            timeout_s: timeout of the call.

        Raises:
            CallRejected: the circuit breaker is open, or no slot became free.
            TimeoutError: the call timed out.
        """
        try:
            async with asyncio.timeout(queue_s):
                await self._slots.acquire()
        except TimeoutError:
            raise self._rejection("at_capacity", f"all slots of {self._store} are in use", _OPEN_S) from None
        try:
            async with self._breaker, asyncio.timeout(timeout_s):
                yield
        except CircuitOpenError as error:
            message = f"the circuit breaker of {self._store} is open"
            raise self._rejection("circuit_open", message, error.retry_after or _OPEN_S) from error
        finally:
            self._slots.release()

    async def check(self) -> None:
        """Raise ``CallRejected`` while the circuit breaker is open. Makes no call."""
        if self._breaker.state is State.OPEN:
            message = f"the circuit breaker of {self._store} is open: most of its last calls failed"
            raise CallRejected(message, retry_after_s=_OPEN_S)

    def _rejection(self, reason: str, message: str, retry_after_s: float) -> CallRejected:
        self._metrics.calls_rejected.labels(self._store, reason).inc()
        return CallRejected(message, retry_after_s=retry_after_s)


class _Failures(FailureClassifier):
    """Counts every exception except the ignored ones."""

    def __init__(self, ignored: tuple[type[Exception], ...]) -> None:
        self._ignored = ignored

    @override
    def is_failure(self, *, result: object, exception: Exception | None) -> bool:
        return exception is not None and not isinstance(exception, self._ignored)


class _StateListener(CoreEventListener):
    """Exports and logs state changes of the circuit breaker."""

    def __init__(self, metrics: QueryMetrics) -> None:
        self._metrics = metrics

    @override
    def on_state_change(self, *, name: str, old: State, new: State) -> None:
        self._metrics.circuit_breaker_open.labels(name).set(new is not State.CLOSED)
        _log.warning("circuit_breaker_state_changed", store=name, old=str(old), new=str(new))
