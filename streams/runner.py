"""The runner: decodes records, runs a step, produces its outcomes, and acknowledges the records.

It does not depend on Faust. Records of a partition are taken, finished and acknowledged in order. While a step cannot
proceed (a store is unavailable, a model throttles), it holds all of them, so none is lost, reordered or dead-lettered
for that reason.
"""

import asyncio
import random
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import structlog

from infra.blobs.port import BlobStoreUnavailable
from infra.embedding.port import EmbeddingThrottled
from infra.kafka.codec import TRACEPARENT, Undecodable, decode, header
from infra.kafka.dead_letters import MAX_REASON_CHARS, encode_dead_letter
from infra.kafka.port import Producer, StreamUnavailable
from infra.opensearch.port import IndexUnavailable
from infra.redis.port import CacheUnavailable
from infra.settings import StreamSettings
from infra.telemetry.tracing import OpenSpan, Tracing
from schemas.events import StreamMessage
from schemas.records import Headers, Record
from streams.core.outcomes import SYSTEMIC_KINDS, DeadLetter, Outcome
from streams.topology import TOPOLOGY, StepName

T = TypeVar("T")

_log = structlog.get_logger(__name__)

UNAVAILABLE: Final = (BlobStoreUnavailable, CacheUnavailable, EmbeddingThrottled, IndexUnavailable, StreamUnavailable)
"""Errors of dependencies, not of records: wait and retry without a limit."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A record as read from Kafka, with the callback that acknowledges it."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    done: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Task:
    """A decoded record."""

    message: StreamMessage
    partition: int
    offset: int
    traceparent: str | None


class Step(Protocol):
    """A step of the topology."""

    name: StepName

    def run(self, tasks: Sequence[Task]) -> AsyncGenerator[Sequence[Outcome], None]:
        """Process a batch. Yields outcomes in the order of the tasks, each as soon as it is final.

        Must be repeatable after a stop at any point.

        Raises:
            one of UNAVAILABLE: a dependency is unavailable; tasks without an outcome are retried.
        """
        ...

    def give_up(self, task: Task, reason: str) -> tuple[Record, ...]:
        """Records that report a dead letter to the next step."""
        ...

    async def close(self, task: Task, kind: str, reason: str) -> Outcome | None:
        """Undo what the attempts of a record have left in stores, before it becomes a dead letter.

        Returns:
            The outcome, if it is more than a dead letter with the records of ``give_up``, or if the record has another
            outcome already. Otherwise None.

        Raises:
            one of UNAVAILABLE: a dependency is unavailable; the call is retried.
        """
        ...


class TooManyDeadLetters(Exception):
    """Too many recent records would become dead letters; the deployment, not the records, is probably at fault."""


class DeadLetterRateLimit:
    """Limits the share of dead letters among the latest records of a step."""

    def __init__(self, step: StepName, settings: StreamSettings) -> None:
        self._step = step
        self._recent: deque[bool] = deque(maxlen=settings.dead_letter_window)
        self._limit = settings.dead_letter_rate * settings.dead_letter_window

    def count(self, outcomes: Sequence[Outcome]) -> None:
        """Count outcomes.

        Raises:
            TooManyDeadLetters: dead letters of ``SYSTEMIC_KINDS`` exceed the limit.
        """
        for outcome in outcomes:
            if not isinstance(outcome, DeadLetter) or outcome.kind not in SYSTEMIC_KINDS:
                self._recent.append(False)
                continue
            self._recent.append(True)
            if sum(self._recent) > self._limit:
                raise TooManyDeadLetters(
                    f"{self._step} would give up {sum(self._recent)} of the last {len(self._recent)} records, the last "
                    f"one as {outcome.kind!r} ({outcome.reason}). It stopped before that record, and nothing is "
                    "lost: check the last deployment, then `freshline dead-letters list`. "
                    "FRESHLINE_STREAMS__DEAD_LETTER_RATE sets the limit; 1 switches it off"
                )


class Runner:
    """Runs one step over the deliveries of one worker."""

    def __init__(
        self,
        step: Step,
        producer: Producer,
        settings: StreamSettings,
        *,
        on_finished: Callable[[StepName, Task | None, Outcome], None],
        on_retry: Callable[[StepName, Exception], None] = lambda _step, _error: None,
        tracing: Tracing | None = None,
    ) -> None:
        self._step = step
        self._row = TOPOLOGY[step.name]
        self._producer = producer
        self._settings = settings
        self._on_finished = on_finished
        self._on_retry = on_retry
        self._tracing = tracing or Tracing()
        self._spans: dict[tuple[int, int], OpenSpan] = {}
        self._queue: asyncio.Queue[Delivery] = asyncio.Queue(maxsize=2 * settings.batch_events)
        self._rate_limit = DeadLetterRateLimit(step.name, settings)
        self.waiting_for: str | None = None
        self.finished_count = 0

    async def take(self, delivery: Delivery) -> None:
        """Enqueue a record; waits while the queue is full (backpressure)."""
        await self._queue.put(delivery)

    async def run(self) -> None:
        """Process until cancelled."""
        while True:
            batch = [await self._queue.get()]
            # Take all records that are queued: a single record never waits for more, and many records share the cost.
            while len(batch) < self._settings.batch_events and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            await self._process_batch(batch)

    async def _process_batch(self, batch: Sequence[Delivery]) -> None:
        unfinished = deque((delivery, self._decode(delivery)) for delivery in batch)
        decoded = [task for _, task in unfinished if isinstance(task, Task)]
        async with aclosing(self._run(decoded)) as results:
            async for outcomes in results:
                await self._finish(unfinished, outcomes)
        if unfinished:
            await self._finish(unfinished, ())

    async def _finish(self, unfinished: deque[tuple[Delivery, Task | DeadLetter]], outcomes: Sequence[Outcome]) -> None:
        """Finish as many decoded deliveries as there are outcomes, and undecodable ones up to the next."""
        final = deque(outcomes)
        finished: list[tuple[Delivery, Task | None, Outcome]] = []
        while unfinished and (final or isinstance(unfinished[0][1], DeadLetter)):
            delivery, task = unfinished.popleft()
            finished.append(
                (delivery, None, task) if isinstance(task, DeadLetter) else (delivery, task, final.popleft())
            )
        # Before anything is produced: after a stop here, the next owner of the partition reads these records again.
        self._rate_limit.count([outcome for _, _, outcome in finished])
        records: list[Record] = []
        for delivery, _, outcome in finished:
            if isinstance(outcome, DeadLetter):
                records.append(self._dead_letter_record(delivery, outcome))
            records += outcome.emit
        await self._until_available(lambda: self._producer.send_all(records))
        for delivery, finished_task, outcome in finished:
            delivery.done()
            self._end_span(delivery, outcome)
            self._on_finished(self._step.name, finished_task, outcome)
        self.finished_count += len(finished)

    async def _run(self, tasks: Sequence[Task]) -> AsyncGenerator[Sequence[Outcome], None]:
        remaining = tasks
        if len(tasks) > 1:
            try:
                async with aclosing(self._attempt(tasks)) as results:
                    async for outcomes in results:
                        remaining = remaining[len(outcomes) :]
                        yield outcomes
            except Exception:  # noqa: BLE001 - logged, and the records are retried
                # One record or all of them are faulty. Each is retried on its own, so only a faulty one is given up.
                _log.exception("batch_failed", step=self._step.name)
        for task in remaining:
            yield [await self._run_alone(task)]

    async def _run_alone(self, task: Task) -> Outcome:
        attempt = 1
        while True:
            try:
                [outcome] = [one async for some in self._attempt([task]) for one in some]
            except Exception as error:  # noqa: BLE001 - logged, counted and retried
                self._on_retry(self._step.name, error)
                _log.exception("record_failed", step=self._step.name, offset=task.offset, attempt=attempt)
                if attempt == self._settings.attempts:
                    reason = f"failed {attempt} times, last error: {type(error).__name__}: {error}"
                    return await self._close(task, "failed", reason[:MAX_REASON_CHARS])
            else:
                return outcome
            await asyncio.sleep(self._backoff_s(attempt))
            attempt += 1

    async def _close(self, task: Task, kind: str, reason: str) -> Outcome:
        for attempt in range(1, self._settings.attempts + 1):
            try:
                ended = await self._until_available(lambda: self._step.close(task, kind, reason))
            except Exception as error:  # noqa: BLE001 - logged, counted and retried
                self._on_retry(self._step.name, error)
                _log.exception("record_not_closed", step=self._step.name, offset=task.offset, attempt=attempt)
                await asyncio.sleep(self._backoff_s(attempt))
            else:
                return ended or DeadLetter(kind, reason, self._step.give_up(task, reason))
        # Remaining state is harmless: the next writer of the document resolves it.
        return DeadLetter(kind, reason, self._step.give_up(task, reason))

    async def _attempt(self, tasks: Sequence[Task]) -> AsyncGenerator[Sequence[Outcome], None]:
        """Outcomes of all tasks; waits for unavailable stores without a limit."""
        remaining, tries = tasks, 0
        while remaining:
            try:
                async with aclosing(self._step.run(remaining)) as results:
                    async for outcomes in results:
                        self.waiting_for, tries = None, 0
                        remaining = remaining[len(outcomes) :]
                        yield outcomes
            except UNAVAILABLE as error:
                tries += 1
                await self._wait(error, tries)

    async def _until_available(self, attempt: Callable[[], Awaitable[T]]) -> T:
        tries = 0
        while True:
            try:
                result = await attempt()
            except UNAVAILABLE as error:
                tries += 1
                await self._wait(error, tries)
            else:
                self.waiting_for = None
                return result

    async def _wait(self, error: Exception, tries: int) -> None:
        self.waiting_for = str(error)
        self._on_retry(self._step.name, error)
        pause_s = max(self._backoff_s(tries), getattr(error, "retry_after_s", 0.0))
        _log.warning("store_unavailable_waiting", step=self._step.name, reason=str(error), pause_s=pause_s)
        await asyncio.sleep(pause_s)

    def _backoff_s(self, tries: int) -> float:
        """Exponential backoff with jitter, so that workers that failed together do not retry together."""
        longest_ms = min(self._settings.retry_max_ms, self._settings.retry_first_ms << min(tries - 1, 20))
        return random.uniform(0.5, 1.0) * longest_ms / 1000  # noqa: S311 - no secret

    def _decode(self, delivery: Delivery) -> Task | DeadLetter:
        try:
            message = decode(self._row.message, delivery.value, delivery.headers)
        except Undecodable as error:
            return DeadLetter("undecodable", str(error))
        attributes: dict[str, str | int] = {
            "messaging.destination.name": self._row.reads.name,
            "messaging.destination.partition.id": str(delivery.partition),
            "messaging.kafka.offset": delivery.offset,
        }
        span = self._tracing.begin(str(self._step.name), header(delivery.headers, TRACEPARENT), attributes)
        self._spans[delivery.partition, delivery.offset] = span
        return Task(message, delivery.partition, delivery.offset, span.traceparent)

    def _end_span(self, delivery: Delivery, outcome: Outcome) -> None:
        span = self._spans.pop((delivery.partition, delivery.offset), None)
        if span is None:  # undecodable record
            return
        if isinstance(outcome, DeadLetter):
            span.end(outcome.kind, failed=True)
        else:
            span.end("finished")

    def _dead_letter_record(self, delivery: Delivery, dead_letter: DeadLetter) -> Record:
        """The dead letter of a record: the original record and the failure."""
        record = Record(
            self._row.dead_letters.name,
            delivery.key or b"",
            delivery.value or b"",
            delivery.headers,
            delivery.partition,
        )
        return encode_dead_letter(
            record,
            topic=self._row.reads,
            offset=delivery.offset,
            step=self._step.name,
            kind=dead_letter.kind,
            reason=dead_letter.reason,
        )
