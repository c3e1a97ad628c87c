"""Answers as they are written: sources first, then text and citations, then what it cost and what it is true for."""

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

import orjson
import structlog

from infra.generation.port import AnswerPart, GenerationError, Generator, Written
from query.answers.answer import AnswerService, sources_of, why_unanswered
from query.answers.broadcast import Broadcast
from query.answers.response import response_body, results
from query.cache.freshness import ReadSnapshot, SharedRead
from query.telemetry.metrics import QueryMetrics
from schemas.queries import Citation, GeneratedAnswer, QueryRequest, Unanswered
from schemas.search import Access

IDLE_S: Final = 10.0
"""A stream on which nothing comes for so long gets a comment, so that no proxy takes it for dead."""

_log = structlog.get_logger(__name__)


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
class _Flight:
    """An answer that is being written, and the look of all who read it."""

    look: SharedRead
    written: Broadcast[_Made]


class AnswerStreams:
    """Answers as events. A finished one is cached as ``AnswerService`` caches it, and one that is cached is told at once.

    Equal questions at a time share one retrieval and one generation, as those of ``AnswerService`` do.

    Args:
        answering: looks, retrieves and keeps.
        generator: writes.
        metrics: where failures and costs are counted.
        idle_s: see ``IDLE_S``.
    """

    def __init__(
        self, *, answering: AnswerService, generator: Generator, metrics: QueryMetrics, idle_s: float = IDLE_S
    ) -> None:
        self._answering = answering
        self._generator = generator
        self._metrics = metrics
        self._idle_s = idle_s
        self._flights: dict[str, _Flight] = {}

    async def begin(self, request: QueryRequest, access: Access) -> AsyncGenerator[StreamEvent | None, None]:
        """The events of an answer; None where a sign of life is due. Closing them ends work that nobody else wants.

        They are ``sources``, then any number of ``token`` and ``citation`` or one ``unanswered``, then ``usage``,
        ``as_of`` and ``done``. Only a failure before the first of them is raised.

        Raises:
            PositionNotReached: ``min_position`` is not reached in time.
            EmbeddingError: the question has no vector.
            IndexUnavailable: nothing is cached and the index cannot answer now.
        """
        began_s = time.perf_counter()
        request = request.model_copy(update={"generate": True})
        key, standing = await self._answering.look(request, access)
        if standing.cached is not None:
            look, made = SharedRead(standing), _replayed(standing.cached)
        else:
            flight = self._flight(request, access, key, standing)
            look, made = flight.look, flight.written.read(idle_s=self._idle_s)
        first = await anext(made)  # what fails before it is not a stream but a problem

        def served() -> ReadSnapshot:
            seen = look.seen_by(standing)
            self._answering.served(access.tenant, key, seen)
            return seen

        return _events(first, made, served, began_s=began_s)

    async def close(self) -> None:
        """End what is still being written."""
        for flight in tuple(self._flights.values()):
            await flight.written.close()

    def _flight(self, request: QueryRequest, access: Access, key: str, standing: ReadSnapshot) -> _Flight:
        flight = self._flights.get(key)
        if flight is None or not flight.look.join(standing):
            look = SharedRead(standing)
            written = Broadcast(
                self._write(request, access, key, look),
                forget=lambda: self._forget(key, look),
                abandoned=self._metrics.abandoned.inc,
            )
            flight = self._flights[key] = _Flight(look, written)
        return flight

    def _forget(self, key: str, look: SharedRead) -> None:
        if key in self._flights and self._flights[key].look is look:
            del self._flights[key]

    async def _write(
        self, request: QueryRequest, access: Access, key: str, look: SharedRead
    ) -> AsyncGenerator[_Made, None]:
        retrieved = await self._answering.retrieve(request, access, key, look)
        if isinstance(retrieved, bytes):
            for part in _parts(retrieved):
                yield part
            return
        yield _Sources(results(retrieved.passages, include_metadata=request.include_metadata))
        try:
            self._answering.spend(access.tenant)
            with self._metrics.stage("generate"):
                stream = self._generator.stream(request.query, sources_of(retrieved), retrieved.search.vector)
                async with aclosing(stream) as parts:
                    async for part in parts:
                        if isinstance(part, Written):
                            self._metrics.generated(input_tokens=part.input_tokens, output_tokens=part.output_tokens)
                            include = request.include_metadata
                            body = response_body(retrieved.passages, part.answer, include_metadata=include)
                            await self._answering.keep(
                                request, access, key, look.standing, body=body, retrieved=retrieved
                            )
                        yield part
        except GenerationError as error:
            reason = why_unanswered(error)
            self._metrics.generation_failures.labels(reason).inc()
            _log.warning("not_generated", reason=str(error))
            yield reason


async def _replayed(body: bytes) -> AsyncGenerator[_Made | None, None]:
    for part in _parts(body):
        yield part


def _parts(body: bytes) -> Iterator[_Made]:
    """A cached answer: all of its text at once, and no tokens spent on it."""
    cached = orjson.loads(body)
    yield _Sources(cached["results"])
    answer = GeneratedAnswer(cached["answer"], tuple(map(Citation.model_validate, cached["citations"])))
    yield AnswerPart(answer.text, answer.citations)
    yield Written(answer, input_tokens=0, output_tokens=0)


async def _events(
    first: _Made | None, rest: AsyncGenerator[_Made | None, None], served: Callable[[], ReadSnapshot], *, began_s: float
) -> AsyncGenerator[StreamEvent | None, None]:
    """``served`` tells at the end what the answer is true for: the first sign of life may come before its search."""
    async with aclosing(rest):
        for event in _told(first):
            yield event
        async for made in rest:
            for event in _told(made):
                yield event
    standing = served()
    yield _event("as_of", standing.as_of.model_dump(mode="json"))
    query_time_ms = round((time.perf_counter() - began_s) * 1_000, 3)
    yield _event("done", {"cached": standing.cached is not None, "query_time_ms": query_time_ms})


def _told(made: _Made | None) -> Iterator[StreamEvent | None]:
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
