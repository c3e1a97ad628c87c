"""The one runner: decodes records, runs a step, acts on the outcomes, marks records finished.

It knows nothing of Faust. Records of one partition are taken, ended and marked in order; a step that cannot go on
(a store is down, a model throttles) holds them all until it can, so nothing is lost, overtaken or dead-lettered for it.
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
from infra.kafka.dead_letters import MAX_REASON_CHARS, encode_letter
from infra.kafka.port import Producer, StreamUnavailable
from infra.opensearch.port import IndexUnavailable
from infra.redis.port import CacheUnavailable
from infra.settings import StreamSettings
from infra.telemetry.tracing import OpenSpan, Tracing
from schemas.events import StreamMessage
from schemas.records import Headers, Record
from streams.core.outcomes import MAYBE_OUR_FAULT, DeadLetter, Outcome
from streams.topology import TOPOLOGY, StepName

T = TypeVar("T")

log = structlog.get_logger(__name__)

UNAVAILABLE: Final = (BlobStoreUnavailable, CacheUnavailable, EmbeddingThrottled, IndexUnavailable, StreamUnavailable)
"""Not the record's fault: wait and try again, for as long as it takes."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A record as it was read, with the promise to mark it."""

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
    """What a step of the topology does."""

    name: StepName

    def run(self, tasks: Sequence[Task]) -> AsyncGenerator[Sequence[Outcome], None]:
        """Process a batch: outcomes of the first tasks, then of those that follow, each as soon as it is final.

        Must be repeatable at any point.

        Raises:
            one of UNAVAILABLE: a store cannot serve now; what has no outcome yet is tried again.
        """
        ...

    def give_up(self, task: Task, reason: str) -> tuple[Record, ...]:
        """The records that carry the news of a dead letter onward."""
        ...

    async def close(self, task: Task, kind: str, reason: str) -> Outcome | None:
        """Take back what tries of a record have left in stores, before it is told as a dead letter.

        Returns:
            How it ends, where that is more than a dead letter with what ``give_up`` tells, or where it turns out to
            have ended otherwise.

        Raises:
            one of UNAVAILABLE: a store cannot serve now; it is tried again.
        """
        ...


class TooManyDeadLetters(Exception):
    """Most of what came lately would be given up: the fault is rather in this deployment than in the records."""


class DeadLetterRateLimit:
    """How much of what a step finished lately it gave up."""

    def __init__(self, step: StepName, settings: StreamSettings) -> None:
        self._step = step
        self._lately: deque[bool] = deque(maxlen=settings.dead_letter_window)
        self._most = settings.dead_letter_share * settings.dead_letter_window

    def count(self, outcomes: Sequence[Outcome]) -> None:
        """Take outcomes into account.

        Raises:
            TooManyDeadLetters: too many of them are dead letters of a kind that may be our own fault.
        """
        for outcome in outcomes:
            if not isinstance(outcome, DeadLetter) or outcome.kind not in MAYBE_OUR_FAULT:
                self._lately.append(False)
                continue
            self._lately.append(True)
            if sum(self._lately) > self._most:
                raise TooManyDeadLetters(
                    f"{self._step} would give up {sum(self._lately)} of the last {len(self._lately)} records, the last "
                    f"one as {outcome.kind!r} ({outcome.reason}). It has stopped before that record, and nothing is "
                    "lost: look at what was deployed last, then at `freshline dead-letters list`. "
                    "FRESHLINE_STREAMS__DEAD_LETTER_SHARE sets the limit; 1 switches it off"
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
        self._letters = DeadLetterRateLimit(step.name, settings)
        self.waiting_for: str | None = None
        self.finished_count = 0

    async def take(self, delivery: Delivery) -> None:
        """Hand over a record; waits while enough are under way (backpressure)."""
        await self._queue.put(delivery)

    async def run(self) -> None:
        """Process until cancelled."""
        while True:
            batch = [await self._queue.get()]
            # Whatever came meanwhile goes along: one record is never made to wait for others, many share the cost.
            while len(batch) < self._settings.batch_events and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            await self._finish(batch)

    async def _finish(self, batch: Sequence[Delivery]) -> None:
        unended = deque((delivery, self._decoded(delivery)) for delivery in batch)
        decoded = [task for _, task in unended if isinstance(task, Task)]
        async with aclosing(self._run(decoded)) as results:
            async for outcomes in results:
                await self._end(unended, outcomes)
        if unended:
            await self._end(unended, ())

    async def _end(self, unended: deque[tuple[Delivery, Task | DeadLetter]], outcomes: Sequence[Outcome]) -> None:
        """End the first deliveries: as many decoded ones as there are outcomes, and undecodable ones up to the next."""
        final = deque(outcomes)
        ends: list[tuple[Delivery, Task | None, Outcome]] = []
        while unended and (final or isinstance(unended[0][1], DeadLetter)):
            delivery, task = unended.popleft()
            ends.append((delivery, None, task) if isinstance(task, DeadLetter) else (delivery, task, final.popleft()))
        # Before anything of them is told: what stopped here is read again by whoever runs next.
        self._letters.count([outcome for _, _, outcome in ends])
        records: list[Record] = []
        for delivery, _, outcome in ends:
            if isinstance(outcome, DeadLetter):
                records.append(self._letter(delivery, outcome))
            records += outcome.emit
        await self._until_available(lambda: self._producer.send_all(records))
        for delivery, ended_task, outcome in ends:
            delivery.done()
            self._end_span(delivery, outcome)
            self._on_finished(self._step.name, ended_task, outcome)
        self.finished_count += len(ends)

    async def _run(self, tasks: Sequence[Task]) -> AsyncGenerator[Sequence[Outcome], None]:
        left = tasks
        if len(tasks) > 1:
            try:
                async with aclosing(self._attempt(tasks)) as results:
                    async for outcomes in results:
                        left = left[len(outcomes) :]
                        yield outcomes
            except Exception:
                # One of them is at fault, or all: alone, each gets its own tries, and only the faulty one is given up.
                log.exception("a batch failed; its records are tried one by one", step=self._step.name)
        for task in left:
            yield [await self._run_alone(task)]

    async def _run_alone(self, task: Task) -> Outcome:
        attempt = 1
        while True:
            try:
                [outcome] = [one async for some in self._attempt([task]) for one in some]
            except Exception as error:
                self._on_retry(self._step.name, error)
                log.exception("a record failed", step=self._step.name, offset=task.offset, attempt=attempt)
                if attempt == self._settings.attempts:
                    reason = f"failed {attempt} times, at last with {type(error).__name__}: {error}"
                    return await self._given_up(task, "failed", reason[:MAX_REASON_CHARS])
            else:
                return outcome
            await asyncio.sleep(self._pause_s(attempt))
            attempt += 1

    async def _given_up(self, task: Task, kind: str, reason: str) -> Outcome:
        for attempt in range(1, self._settings.attempts + 1):
            try:
                ended = await self._until_available(lambda: self._step.close(task, kind, reason))
            except Exception as error:
                self._on_retry(self._step.name, error)
                log.exception("a record was not closed", step=self._step.name, offset=task.offset, attempt=attempt)
                await asyncio.sleep(self._pause_s(attempt))
            else:
                return ended or DeadLetter(kind, reason, self._step.give_up(task, reason))
        # What is left does no harm: whoever comes next to it finds out what it is.
        return DeadLetter(kind, reason, self._step.give_up(task, reason))

    async def _attempt(self, tasks: Sequence[Task]) -> AsyncGenerator[Sequence[Outcome], None]:
        """Outcomes of all tasks, whatever waiting for stores that takes."""
        left, tries = tasks, 0
        while left:
            try:
                async with aclosing(self._step.run(left)) as results:
                    async for outcomes in results:
                        self.waiting_for, tries = None, 0
                        left = left[len(outcomes) :]
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
        pause_s = max(self._pause_s(tries), getattr(error, "retry_after_s", 0.0))
        log.warning("waiting for a store", step=self._step.name, reason=str(error), pause_s=pause_s)
        await asyncio.sleep(pause_s)

    def _pause_s(self, tries: int) -> float:
        """Exponential, with jitter, so that workers that failed together do not come back together."""
        longest_ms = min(self._settings.retry_max_ms, self._settings.retry_first_ms << min(tries - 1, 20))
        return random.uniform(0.5, 1.0) * longest_ms / 1000  # noqa: S311 - no secret

    def _decoded(self, delivery: Delivery) -> Task | DeadLetter:
        try:
            message = decode(self._row.message, delivery.value, delivery.headers)
        except Undecodable as error:
            return DeadLetter("undecodable", str(error))
        about: dict[str, str | int] = {
            "messaging.destination.name": self._row.reads.name,
            "messaging.destination.partition.id": str(delivery.partition),
            "messaging.kafka.offset": delivery.offset,
        }
        span = self._tracing.begin(str(self._step.name), header(delivery.headers, TRACEPARENT), about)
        self._spans[delivery.partition, delivery.offset] = span
        return Task(message, delivery.partition, delivery.offset, span.traceparent)

    def _end_span(self, delivery: Delivery, outcome: Outcome) -> None:
        span = self._spans.pop((delivery.partition, delivery.offset), None)
        if span is None:  # of a record that could not be decoded
            return
        if isinstance(outcome, DeadLetter):
            span.end(outcome.kind, failed=True)
        else:
            span.end("finished")

    def _letter(self, delivery: Delivery, letter: DeadLetter) -> Record:
        """The record as it was, and what happened."""
        record = Record(
            self._row.dead_letters.name,
            delivery.key or b"",
            delivery.value or b"",
            delivery.headers,
            delivery.partition,
        )
        return encode_letter(
            record,
            topic=self._row.reads,
            offset=delivery.offset,
            step=self._step.name,
            kind=letter.kind,
            reason=letter.reason,
        )
