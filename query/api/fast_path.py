"""Answers that lie in this process already, from the socket to the bytes, with nothing of a framework between.

What is not such a hit goes on to the application, untouched: every other route, every question of another form, whoever
is not known yet, and every answer that is not here. So nothing here decides anything that the application decides
differently; both give the same bytes but for the time that an answer took.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final, NamedTuple

from fastapi import Response
from prometheus_client import Histogram
from pydantic import ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra.credentials.port import Principal
from infra.web.credentials import Credentials
from infra.web.limits import OverLimit, TenantLimit
from infra.web.problems import ProblemRaised, problem_response
from query.answers.answer import AuditHook
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

LONGEST_BYTES: Final = 16_384
"""Longer questions take the other way; they are rare, and would take much of what is remembered."""

REMEMBERED_BYTES: Final = 16_000_000
"""Bodies whose key is known, of all tenants together."""

AT_A_TIME: Final = 64
"""Questions that the application works on: as many as a process asks of the index at most."""

WAITING: Final = 32
"""Different questions that wait for their turn; what comes beyond is refused, unless its answer lies in Redis. Together
with those that are worked on they are what one process answers in less than a second."""

_FIRST_S: Final = 2.0
"""How long an equal question is waited for; then each goes on by itself."""

_PROOF_S: Final = 1.0
"""How long an answer of this process waits for the proof that no drop of it was missed. One comes several times in a
second, and to have thousands look elsewhere meanwhile is what would keep it from being heard."""

_JSON: Final = b"application/json"
_OVERHEAD_BYTES: Final = 300
_WANTED: Final = {b"authorization": "authorization", b"x-api-key": "x-api-key", b"host": "host"}

Near = Callable[[str, str], NearHit | None]
"""Tenant and key → the answer, if it is in this process and may be served."""

Shared = Callable[[str, str], Awaitable[NearHit | None]]
"""Tenant and key → the answer, if any process has it and it may be served."""

Proof = Callable[[str, str], Awaitable[bool]]
"""Tenant and key → True after the next proof, if the answer is in this process and only lacks that; else False."""


async def _no_proof(_tenant: str, _key: str) -> bool:
    """Answers of this process are served, or not here."""
    return False


async def _not_shared(_tenant: str, _key: str) -> None:
    """Answers of this process are all there are."""


class Plain(NamedTuple):
    """A question of the usual form.

    Attributes:
        key: of its answer.
        quick: False where a text is to be written, which may take its time.
    """

    key: str
    quick: bool


class Keys:
    """The cache key of a body, without reading equal bodies twice.

    Args:
        maker: what decides an answer besides the question.
        max_bytes: see ``REMEMBERED_BYTES``.
    """

    def __init__(self, maker: AnswerMaker, *, max_bytes: int = REMEMBERED_BYTES) -> None:
        self._maker = maker
        self._max_bytes = max_bytes
        self._bytes = 0
        self._known: OrderedDict[tuple[bytes, Access], Plain] = OrderedDict()

    def of(self, body: bytes, access: Access) -> Plain | None:
        """The key; None for what is no plain question: the application says what is wrong with it, or waits for it."""
        name = (body, access)
        plain = self._known.get(name)
        if plain is not None:
            self._known.move_to_end(name)
            return plain
        try:
            request = QueryRequest.model_validate_json(body)
        except ValidationError:
            return None
        if request.min_position is not None or not normalised(request.query):
            return None
        plain = self._known[name] = Plain(cache_key(request, access, self._maker), not request.generate)
        self._bytes += len(body) + _OVERHEAD_BYTES
        while self._bytes > self._max_bytes:
            (forgotten, _), _ = self._known.popitem(last=False)
            self._bytes -= len(forgotten) + _OVERHEAD_BYTES
        return plain


class _Request(NamedTuple):
    scope: Scope
    receive: Receive
    send: Send


class FastPath:
    """ASGI application before ``app``.

    Where the line for the index is full, an answer may still lie in Redis; if not, the question is refused here, at a
    tenth of what it costs further in: the time that refusing takes is not there for answering.

    Only some requests at a time go on to ``app``, and of equal questions one at a time, as long as they are answered
    without writing. The others wait here, where waiting costs nothing, and look again when it is their turn: most find
    their answer then. So thousands who come at once do not keep the process from hearing what it needs to hear to serve
    hits.

    Args:
        app: what answers everything else.
        near: the answers of this process.
        keys: of bodies.
        credentials: knows who asked lately.
        limit: of each tenant; the same as the application's.
        operations: knows when the process is about to end.
        counts: counts hits as the application would.
        audit: told of every hit.
        full: whether a tenant's questions would be refused now, if their answers must be retrieved.
        shared: the answers of all processes.
        proof: what answers of this process wait for that are here and not served.
        at_a_time: requests for ``app``.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        near: Near,
        keys: Keys,
        credentials: Credentials,
        limit: TenantLimit,
        operations: Operations,
        counts: HitCounts,
        audit: AuditHook | None = None,
        full: Callable[[str], bool] = lambda _tenant: False,
        shared: Shared = _not_shared,
        proof: Proof = _no_proof,
        at_a_time: int = AT_A_TIME,
    ) -> None:
        self._app = app
        self._near = near
        self._keys = keys
        self._credentials = credentials
        self._limit = limit
        self._operations = operations
        self._counts = counts
        self._audit = audit
        self._full = full
        self._shared = shared
        self._proof = proof
        self._refusals = {path: _refusal(path) for path in PATHS}
        self._stamp = Stamp()
        self._places = asyncio.Semaphore(at_a_time)
        self._waiting = 0
        self._first: dict[str, asyncio.Event] = {}

    def at_once(self, url: bytes, headers: list[tuple[bytes, bytes]], body: bytes) -> bytes | None:
        """The answer to a request that has come as a whole, if it is here."""
        began_s = time.perf_counter()
        access = None if self._operations.draining else self._access(headers)
        if access is None:
            return None
        plain = self._keys.of(body, access)
        return None if plain is None else self._answer(plain, access, url.decode(), began_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] != "http" or scope["path"] not in PATHS or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        began_s = time.perf_counter()
        access = None if self._operations.draining else self._access(scope["headers"])
        if access is None:
            await self._app(scope, receive, send)
            return
        message = await receive()
        if message["type"] != "http.request" or message.get("more_body"):
            await self._app(scope, _again(message, receive), send)
            return
        plain = self._keys.of(message.get("body", b""), access)
        if plain is None:
            await self._app(scope, _again(message, receive), send)
            return
        answer = await self._proven_answer(plain, access, scope["path"], began_s)
        if answer is not None:
            await _send(answer, send)
        elif plain.quick:
            await self._in_turn(plain, access, began_s, _Request(scope, _again(message, receive), send))
        else:
            await self._app(scope, _again(message, receive), send)

    async def _in_turn(self, plain: Plain, access: Access, began_s: float, request: _Request) -> None:
        first = self._first.get(plain.key)
        if first is None:
            if self._full(access.tenant) or (self._places.locked() and self._waiting >= WAITING):
                await self._shared_or_refused(plain, access, began_s, request)
                return
            first = self._first[plain.key] = asyncio.Event()
            try:
                async with self._place():
                    await self._app(request.scope, request.receive, request.send)
            finally:
                del self._first[plain.key]
                first.set()
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_S):
                await first.wait()
        answer = await self._proven_answer(plain, access, request.scope["path"], began_s)
        if answer is None:
            async with self._place():
                # Whoever had the place may have brought it.
                answer = self._answer(plain, access, request.scope["path"], began_s)
                if answer is None:
                    await self._app(request.scope, request.receive, request.send)
                    return
        await _send(answer, request.send)

    async def _shared_or_refused(self, plain: Plain, access: Access, began_s: float, request: _Request) -> None:
        path = request.scope["path"]
        hit = await self._shared(access.tenant, plain.key)
        if hit is None:
            self._counts.note_refused(time.perf_counter() - began_s)
            await self._refusals[path](request.scope, request.receive, request.send)
            return
        answer = self._stamped(hit, plain, access, path, began_s)
        if answer is None:
            await self._app(request.scope, request.receive, request.send)
        else:
            await _send(answer, request.send)

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._places.release()

    async def _proven_answer(self, plain: Plain, access: Access, path: str, began_s: float) -> bytes | None:
        """As ``_answer``, once there is a proof where that is all that is missing."""
        answer = self._answer(plain, access, path, began_s)
        if answer is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_PROOF_S):
                    while answer is None and await self._proof(access.tenant, plain.key):
                        answer = self._answer(plain, access, path, began_s)
        return answer

    def _answer(self, plain: Plain, access: Access, path: str, began_s: float) -> bytes | None:
        """The answer, counted as served; None where it is not here or may not be given."""
        hit = self._near(access.tenant, plain.key)
        return None if hit is None else self._stamped(hit, plain, access, path, began_s)

    def _stamped(self, hit: NearHit, plain: Plain, access: Access, path: str, began_s: float) -> bytes | None:
        try:
            self._limit.take(access.tenant)
        except OverLimit:
            return None  # the application says so; nothing was counted
        if self._audit is not None:
            self._audit(access.tenant, plain.key, hit.body, hit.positions)
        took_ms = (time.perf_counter() - began_s) * 1_000
        self._counts.note(path, took_ms, hit.checked_ms)
        return self._stamp.on(hit.body, hit.positions, hit.checked_ms, query_time_ms=took_ms)

    def _access(self, headers: list[tuple[bytes, bytes]]) -> Access | None:
        """Whom the request speaks for, if that is known without waiting and it is a question of the usual form."""
        told: dict[str, str] = {}
        is_json, length = False, b""
        for name, value in headers:
            if name == b"content-type":
                is_json = value == _JSON
            elif name == b"content-length":
                length = value
            elif name in _WANTED and _WANTED[name] not in told:
                told[_WANTED[name]] = value.decode("latin-1")
        if not is_json or not length.isdigit() or int(length) > LONGEST_BYTES:
            return None
        principal = self._credentials.known_sender(told)
        return principal.access if principal is not None and _may_ask(principal) else None


def _refusal(path: str) -> Response:
    detail = "more is asked than can be answered now; ask again after `Retry-After`"
    raised = ProblemRaised(ProblemType.UNAVAILABLE, detail, retry_after_s=RETRY_AFTER_S)
    return problem_response(raised.problem.model_copy(update={"instance": path}))


async def _send(answer: bytes, send: Send) -> None:
    headers = [(b"content-length", b"%d" % len(answer)), (b"content-type", _JSON)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


def _may_ask(principal: Principal) -> bool:
    return CredentialScope.QUERY in principal.scopes


def _again(first: Message, receive: Receive) -> Receive:
    """What was received already, then the rest."""
    waiting: Message | None = first

    async def receiving() -> Message:
        nonlocal waiting
        if waiting is not None:
            message, waiting = waiting, None
            return message
        return await receive()

    return receiving


def counted_in(seconds: Histogram) -> dict[str, Histogram]:
    """Where the times of hits go, by path: among those of the application's own route."""
    return {path: seconds.labels("query", "POST", path, "200") for path in PATHS}
