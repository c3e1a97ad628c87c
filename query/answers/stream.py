"""Streamed answers: sources first, then text and citations as they are written, then token usage and positions."""

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

import orjson

from infra.generation.port import AnswerPart, GenerationError, Generator, Written
from query.answers.answer import AnswerService
from query.answers.broadcast import Broadcast
from query.answers.fill import AnswerFill, sources_of
from query.answers.response import response_body, results
from query.answers.single_flight import SingleFlight
from query.cache.freshness import ReadSnapshot, SharedRead
from query.telemetry.metrics import QueryMetrics
from schemas.queries import Citation, GeneratedAnswer, QueryRequest, Unanswered
from schemas.search import Access

IDLE_S: Final = 10.0
"""An idle stream gets a keep-alive comment at this interval, so that no proxy closes it."""


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """A server-sent event: its name, and its data as JSON."""

    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class _Sources:
    results: list[dict[str, Any]]


_Made = _Sources | AnswerPart | Written | Unanswered


@dataclass(frozen=True, slots=True)
class _Streaming:
    """An answer that is being written, and the latest read of all requests that share it."""

    read: SharedRead
    written: Broadcast[_Made]


class AnswerStreams:
    """Answers as server-sent events. A finished answer is stored as by ``AnswerService``; a cached one is sent at once.

    Concurrent requests for the same answer share one retrieval and one generation.

    Args:
        answers: reads and counts.
        fill: retrieves and stores.
        generator: writes.
        metrics: counts failures and tokens.
        idle_s: see ``IDLE_S``.
    """

    def __init__(
        self,
        *,
        answers: AnswerService,
        fill: AnswerFill,
        generator: Generator,
        metrics: QueryMetrics,
        idle_s: float = IDLE_S,
    ) -> None:
        self._answers = answers
        self._fill = fill
        self._generator = generator
        self._metrics = metrics
        self._idle_s = idle_s
        self._flights: SingleFlight[_Streaming] = SingleFlight()

    async def begin(self, request: QueryRequest, access: Access) -> AsyncGenerator[StreamEvent | None, None]:
        """Events of an answer; None for a keep-alive. Closing the generator cancels work that no other request shares.

        They are ``sources``, then any number of ``token`` and ``citation`` or one ``unanswered``, then ``usage``,
        ``as_of`` and ``done``. Only a failure before the first of them is raised.

        Raises:
            PositionNotReached: ``min_position`` was not reached in time.
            EmbeddingError: the question has no vector.
            IndexUnavailable: the answer is not cached, and the index is unavailable or the process overloaded.
        """
        began_s = time.perf_counter()
        request = request.model_copy(update={"generate": True})
        key, snapshot = await self._answers.read(request, access)
        if snapshot.cached is not None:
            read, made = SharedRead(snapshot), _replayed(snapshot.cached)
        else:
            flight = self._flights.join_or_start(key, snapshot, lambda read: self._start(request, access, key, read))
            read, made = flight.read, flight.written.read(idle_s=self._idle_s)
        first = await anext(made)  # what fails before it becomes a problem response, not a stream

        def count() -> ReadSnapshot:
            shared = read.seen_by(snapshot)
            self._answers.count(access.tenant, key, shared)
            return shared

        return _events(first, made, count, began_s=began_s)

    async def close(self) -> None:
        """Cancel what is still being written."""
        for flight in self._flights.flights():
            await flight.written.close()

    def _start(self, request: QueryRequest, access: Access, key: str, read: SharedRead) -> _Streaming:
        written = Broadcast(
            self._write(request, access, key, read),
            on_closed=lambda: self._flights.end(key, read),
            on_abandoned=self._metrics.answers_abandoned.inc,
        )
        return _Streaming(read, written)

    async def _write(
        self, request: QueryRequest, access: Access, key: str, read: SharedRead
    ) -> AsyncGenerator[_Made, None]:
        retrieved = await self._fill.retrieve(request, access, key, read)
        if isinstance(retrieved, bytes):
            for part in _parts(retrieved):
                yield part
            return
        yield _Sources(results(retrieved.passages, include_metadata=request.include_metadata))
        try:
            self._fill.spend(access.tenant)
            with self._metrics.stage("generate"):
                stream = self._generator.stream(request.query, sources_of(retrieved), retrieved.search.vector)
                async with aclosing(stream) as parts:
                    async for part in parts:
                        if isinstance(part, Written):
                            self._metrics.count_tokens(input_tokens=part.input_tokens, output_tokens=part.output_tokens)
                            include = request.include_metadata
                            body = response_body(retrieved.passages, part.answer, include_metadata=include)
                            await self._fill.store(request, access, key, read.snapshot, body=body, retrieved=retrieved)
                        yield part
        except GenerationError as error:
            yield self._fill.unanswered(error)


async def _replayed(body: bytes) -> AsyncGenerator[_Made | None, None]:
    for part in _parts(body):
        yield part


def _parts(body: bytes) -> Iterator[_Made]:
    """A cached answer: its whole text in one part, and no tokens used."""
    cached = orjson.loads(body)
    yield _Sources(cached["results"])
    answer = GeneratedAnswer(cached["answer"], tuple(map(Citation.model_validate, cached["citations"])))
    yield AnswerPart(answer.text, answer.citations)
    yield Written(answer, input_tokens=0, output_tokens=0)


async def _events(
    first: _Made | None, rest: AsyncGenerator[_Made | None, None], count: Callable[[], ReadSnapshot], *, began_s: float
) -> AsyncGenerator[StreamEvent | None, None]:
    """``count`` is called at the end and returns the positions: the first keep-alive may precede the search."""
    async with aclosing(rest):
        for event in _events_of(first):
            yield event
        async for made in rest:
            for event in _events_of(made):
                yield event
    snapshot = count()
    yield _event("as_of", snapshot.as_of.model_dump(mode="json"))
    query_time_ms = round((time.perf_counter() - began_s) * 1_000, 3)
    yield _event("done", {"cached": snapshot.cached is not None, "query_time_ms": query_time_ms})


def _events_of(made: _Made | None) -> Iterator[StreamEvent | None]:
    match made:
        case None:
            yield None
        case _Sources():
            yield _event("sources", {"results": made.results})
        case AnswerPart():
            if made.text:
                yield _event("token", {"text": made.text})
            for citation in made.citations:
                yield _event("citation", citation.model_dump())
        case Written():
            yield _event("usage", {"input_tokens": made.input_tokens, "output_tokens": made.output_tokens})
        case Unanswered():
            yield _event("unanswered", {"reason": made})


def _event(name: str, data: dict[str, Any]) -> StreamEvent:
    return StreamEvent(name, orjson.dumps(data))
