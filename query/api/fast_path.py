"""Fast path for near-cache hits: from the socket to the response bytes without the web framework.

A request that is not such a hit is passed to the application unchanged: every other route, every other form of request,
unverified credentials, and answers that are not in the near cache. The fast path makes no decision differently from the
application, and both send the same bytes except for the query time.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from fastapi import Response
from prometheus_client import Histogram
from pydantic import ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra.credentials.port import Principal
from infra.web.credentials import Credentials
from infra.web.limits import OverLimit, TenantLimit
from infra.web.problems import ProblemRaised, problem_response
from query.answers.answer import AnswerObserver, NoObserver
from query.answers.response import Stamp
from query.api.hit_counts import HitCounts
from query.cache.key import AnswerMaker, cache_key, normalised
from query.cache.near_cache import NearHit
from query.operations.endpoints import Operations
from query.overload.admission import RETRY_AFTER_S
from schemas.credentials import Scope as CredentialScope
from schemas.problems import ProblemType
from schemas.queries import QueryRequest
from schemas.search import Access

PATHS: Final = frozenset({"/v1/query", "/query"})
URLS: Final = frozenset(path.encode() for path in PATHS)

MAX_BODY_BYTES: Final = 16_384
"""Longer questions skip the fast path: they are rare, and would fill the key cache."""

KEY_CACHE_BYTES: Final = 16_000_000
"""Request bodies whose cache key is remembered, of all tenants together."""

MAX_CONCURRENT: Final = 64
"""Requests that the application handles at a time: the most that one process asks of the index."""

MAX_QUEUED: Final = 32
"""Different questions that wait for the application. Further ones are rejected unless their answer is in Redis. With
those being handled, they are what one process answers in less than a second."""

_LEADER_TIMEOUT_S: Final = 2.0
"""How long an equal question in progress is waited for. After that each request proceeds on its own."""

_HEARTBEAT_TIMEOUT_S: Final = 1.0
"""How long a near-cache answer waits for the next heartbeat. Heartbeats arrive several times per second. Without the
wait, thousands of requests would go to Redis and delay the very message they lack."""

_JSON: Final = b"application/json"
_OVERHEAD_BYTES: Final = 300
_WANTED: Final = {b"authorization": "authorization", b"x-api-key": "x-api-key", b"host": "host"}


class CachedAnswers(Protocol):
    """Answers that may be served without the application."""

    def near_hit(self, tenant: str, key: str) -> NearHit | None:
        """The answer from the near cache."""
        ...

    async def await_heartbeat(self, tenant: str, key: str) -> bool:
        """Wait for the next heartbeat if that is all a near-cache answer lacks; else return False at once."""
        ...

    async def redis_hit(self, tenant: str, key: str) -> NearHit | None:
        """The answer from Redis."""
        ...


class Capacity(Protocol):
    """Capacity for retrievals."""

    def is_at_capacity(self, tenant: str) -> bool:
        """Whether a retrieval for the tenant would be rejected now."""
        ...


@dataclass(frozen=True, slots=True)
class Gate:
    """What decides whether a request may be answered here.

    Attributes:
        credentials: recently verified credentials.
        limit: rate limit of each tenant; shared with the application.
        operations: whether the process is draining.
    """

    credentials: Credentials
    limit: TenantLimit
    operations: Operations


class Question(NamedTuple):
    """A question that the fast path understands.

    Attributes:
        key: cache key of its answer.
        generates: True if an answer is to be generated, which may take long.
    """

    key: str
    generates: bool


class QuestionKeys:
    """Cache keys by request body, so that equal bodies are parsed once.

    Args:
        maker: identifies everything besides question and reader that decides an answer.
        max_bytes: see ``KEY_CACHE_BYTES``.
    """

    def __init__(self, maker: AnswerMaker, *, max_bytes: int = KEY_CACHE_BYTES) -> None:
        self._maker = maker
        self._max_bytes = max_bytes
        self._bytes = 0
        self._questions: OrderedDict[tuple[bytes, Access], Question] = OrderedDict()

    def of(self, body: bytes, access: Access) -> Question | None:
        """The question; None if it is invalid or has a ``min_position``, which the application handles."""
        name = (body, access)
        question = self._questions.get(name)
        if question is not None:
            self._questions.move_to_end(name)
            return question
        try:
            request = QueryRequest.model_validate_json(body)
        except ValidationError:
            return None
        if request.min_position is not None or not normalised(request.query):
            return None
        question = self._questions[name] = Question(cache_key(request, access, self._maker), request.generate)
        self._bytes += len(body) + _OVERHEAD_BYTES
        while self._bytes > self._max_bytes:
            (evicted, _), _ = self._questions.popitem(last=False)
            self._bytes -= len(evicted) + _OVERHEAD_BYTES
        return question


class _Request(NamedTuple):
    scope: Scope
    receive: Receive
    send: Send


class FastPath:
    """ASGI application in front of ``app``.

    Where retrieval is at capacity, an answer may still be in Redis. If not, the question is rejected here, at a tenth
    of what a rejection costs in the application.

    A bounded number of requests is passed to ``app`` at a time, and only one of several equal ones unless it generates.
    The others wait here, where waiting is cheap, and check the near cache again when it is their turn: most find their
    answer then. So a burst of thousands of requests does not delay the invalidation messages that hits depend on.

    Args:
        app: handles all other requests.
        answers: cached answers.
        keys: cache keys of request bodies.
        gate: credentials, rate limits and draining state.
        counts: counts hits as the application would.
        capacity: retrieval capacity; None for unlimited.
        observer: observes hits.
        max_concurrent: requests passed to ``app`` at a time.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        answers: CachedAnswers,
        keys: QuestionKeys,
        gate: Gate,
        counts: HitCounts,
        capacity: Capacity | None = None,
        observer: AnswerObserver | None = None,
        max_concurrent: int = MAX_CONCURRENT,
    ) -> None:
        self._app = app
        self._answers = answers
        self._keys = keys
        self._gate = gate
        self._counts = counts
        self._capacity = capacity
        self._observer = observer or NoObserver()
        self._rejections = {path: _rejection(path) for path in PATHS}
        self._stamp = Stamp()
        self._slots = asyncio.Semaphore(max_concurrent)
        self._queued = 0
        self._leaders: dict[str, asyncio.Event] = {}

    def respond(self, url: bytes, headers: list[tuple[bytes, bytes]], body: bytes) -> bytes | None:
        """The response body for a complete request, if its answer is in the near cache. Does not block."""
        began_s = time.perf_counter()
        access = None if self._gate.operations.draining else self._access(headers)
        if access is None:
            return None
        question = self._keys.of(body, access)
        return None if question is None else self._answer(question, access, url.decode(), began_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, or pass it to the application."""
        if scope["type"] != "http" or scope["path"] not in PATHS or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        began_s = time.perf_counter()
        access = None if self._gate.operations.draining else self._access(scope["headers"])
        if access is None:
            await self._app(scope, receive, send)
            return
        message = await receive()
        if message["type"] != "http.request" or message.get("more_body"):
            await self._app(scope, _replay(message, receive), send)
            return
        question = self._keys.of(message.get("body", b""), access)
        if question is None:
            await self._app(scope, _replay(message, receive), send)
            return
        answer = await self._answer_or_heartbeat(question, access, scope["path"], began_s)
        if answer is not None:
            await _send(answer, send)
        elif question.generates:
            await self._app(scope, _replay(message, receive), send)
        else:
            await self._lead_or_follow(question, access, began_s, _Request(scope, _replay(message, receive), send))

    async def _lead_or_follow(self, question: Question, access: Access, began_s: float, request: _Request) -> None:
        leader = self._leaders.get(question.key)
        if leader is None:
            at_capacity = self._capacity is not None and self._capacity.is_at_capacity(access.tenant)
            if at_capacity or (self._slots.locked() and self._queued >= MAX_QUEUED):
                await self._redis_hit_or_reject(question, access, began_s, request)
                return
            leader = self._leaders[question.key] = asyncio.Event()
            try:
                async with self._slot():
                    await self._app(request.scope, request.receive, request.send)
            finally:
                del self._leaders[question.key]
                leader.set()
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(_LEADER_TIMEOUT_S):
                await leader.wait()
        answer = await self._answer_or_heartbeat(question, access, request.scope["path"], began_s)
        if answer is None:
            async with self._slot():
                # The request that held the slot may have filled it.
                answer = self._answer(question, access, request.scope["path"], began_s)
                if answer is None:
                    await self._app(request.scope, request.receive, request.send)
                    return
        await _send(answer, request.send)

    async def _redis_hit_or_reject(self, question: Question, access: Access, began_s: float, request: _Request) -> None:
        path = request.scope["path"]
        hit = await self._answers.redis_hit(access.tenant, question.key)
        if hit is None:
            self._counts.record_rejected(time.perf_counter() - began_s)
            await self._rejections[path](request.scope, request.receive, request.send)
            return
        answer = self._stamped(hit, question, access, path, began_s)
        if answer is None:
            await self._app(request.scope, request.receive, request.send)
        else:
            await _send(answer, request.send)

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        self._queued += 1
        try:
            await self._slots.acquire()
        finally:
            self._queued -= 1
        try:
            yield
        finally:
            self._slots.release()

    async def _answer_or_heartbeat(self, question: Question, access: Access, path: str, began_s: float) -> bytes | None:
        """As ``_answer``, after waiting for a heartbeat if that is all that is missing."""
        answer = self._answer(question, access, path, began_s)
        if answer is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_HEARTBEAT_TIMEOUT_S):
                    while answer is None and await self._answers.await_heartbeat(access.tenant, question.key):
                        answer = self._answer(question, access, path, began_s)
        return answer

    def _answer(self, question: Question, access: Access, path: str, began_s: float) -> bytes | None:
        """The response body, counted as sent; None if there is no near-cache hit."""
        hit = self._answers.near_hit(access.tenant, question.key)
        return None if hit is None else self._stamped(hit, question, access, path, began_s)

    def _stamped(self, hit: NearHit, question: Question, access: Access, path: str, began_s: float) -> bytes | None:
        try:
            self._gate.limit.take(access.tenant)
        except OverLimit:
            return None  # the application sends the problem; nothing was counted
        self._observer.on_hit(access.tenant, question.key, hit.body, hit.positions)
        took_ms = (time.perf_counter() - began_s) * 1_000
        self._counts.record(path, took_ms, hit.checked_ms)
        return self._stamp.on(hit.body, hit.positions, hit.checked_ms, query_time_ms=took_ms)

    def _access(self, headers: list[tuple[bytes, bytes]]) -> Access | None:
        """The reader, if the credential was verified recently and the request is short JSON."""
        presented: dict[str, str] = {}
        is_json, length = False, b""
        for name, value in headers:
            if name == b"content-type":
                is_json = value == _JSON
            elif name == b"content-length":
                length = value
            elif name in _WANTED and _WANTED[name] not in presented:
                presented[_WANTED[name]] = value.decode("latin-1")
        if not is_json or not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return None
        principal = self._gate.credentials.identify_cached(presented)
        return principal.access if principal is not None and _may_ask(principal) else None


def _rejection(path: str) -> Response:
    detail = "the service is overloaded; retry after `Retry-After`"
    raised = ProblemRaised(ProblemType.UNAVAILABLE, detail, retry_after_s=RETRY_AFTER_S)
    return problem_response(raised.problem.model_copy(update={"instance": path}))


async def _send(answer: bytes, send: Send) -> None:
    headers = [(b"content-length", b"%d" % len(answer)), (b"content-type", _JSON)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


def _may_ask(principal: Principal) -> bool:
    return CredentialScope.QUERY in principal.scopes


def _replay(first: Message, receive: Receive) -> Receive:
    """A ``receive`` that returns ``first`` before the rest."""
    waiting: Message | None = first

    async def receiving() -> Message:
        nonlocal waiting
        if waiting is not None:
            message, waiting = waiting, None
            return message
        return await receive()

    return receiving


def counted_in(seconds: Histogram) -> dict[str, Histogram]:
    """Latency histogram of each path, shared with the application's route."""
    return {path: seconds.labels("query", "POST", path, "200") for path in PATHS}
