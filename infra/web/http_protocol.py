"""HTTP/1 on one connection: uvicorn's protocol, held to one response for each request and to whole bodies."""

import asyncio
from http import HTTPStatus
from typing import Any, Final, cast

import httptools
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from infra.web.problems import ProblemRaised, problem_response
from schemas.problems import ProblemType


class _Unacceptable(Exception):
    """A head that parses, and is refused before the application sees it."""

    def __init__(self, status: HTTPStatus, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class _Closed:
    """Stands in for the parser once a request was malformed: where the next one begins cannot be known."""

    @staticmethod
    def feed_data(_data: bytes) -> None:
        """Drop it."""


_CLOSED: Final = cast("httptools.HttpRequestParser", _Closed())


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol for all services.

    An offered upgrade is ignored, as RFC 9110 section 7.8 permits: the request is read, body and all, as if ``Upgrade``
    were not in its head. The parser takes what follows such a head for another protocol, so the head is parsed again
    without the offer.

    A malformed request gets its 400 in its turn, after the responses to the requests before it. If the application
    already has its head, it sees a client that disconnected: never a body that is shorter than the one declared. After
    that nothing is read from the connection, and it is closed.
    """

    def __init__(self, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._running: RequestResponseCycle | None = None
        self._upgrade_offered = False
        self._in_body = False

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        """See ``HttpToolsProtocol``, which tells only the last request; an earlier one may be under way."""
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:
            _disconnect(self._running)

    @override
    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offered:
            self._read_on(memoryview(data)[offered.args[0] :])
        except httptools.HttpParserError as error:
            self.refuse(error)

    @override
    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            self._upgrade_offered = True
            return
        version = self.parser.get_http_version()
        if version != "1.1":
            self._check_older(version)
        super().on_headers_complete()
        self._in_body = True

    def on_chunk_header(self) -> None:
        """Part the headers from trailers, which must not count as headers (RFC 9110 section 6.5.1)."""
        self.headers = []

    @override
    def on_message_complete(self) -> None:
        if not self._upgrade_offered:
            self._in_body = False
            super().on_message_complete()

    def refuse(self, error: httptools.HttpParserError) -> None:
        """Answer the request that is being read with a problem, in its turn, and close the connection after that."""
        self.parser = _CLOSED
        earlier = self._running
        if self._in_body:
            if self.cycle is not self._running:
                self.pipeline.popleft()  # it waits behind others, as the last
            elif self.cycle.response_started:
                self.transport.close()
                return
            else:
                _disconnect(self.cycle)
                earlier = None
        self.cycle = RequestResponseCycle(
            scope=cast("Any", {"type": "http", "method": "POST"}),  # of a method whose responses have bodies
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=False,
            on_response=self.on_response_complete,
        )
        refusal = cast("Any", _refusal(error))
        if earlier is None or earlier.response_complete:
            self._start_asgi_task(self.cycle, refusal)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, refusal))

    @override
    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        if cycle.waiting_for_100_continue:
            app = _closing_unread(cycle, app)
        super()._start_asgi_task(cycle, app)

    def _read_on(self, rest: memoryview) -> None:
        """Read the request whose head offered an upgrade; ``rest`` has come after that head."""
        while True:
            self._upgrade_offered = False
            try:
                self._parse_without_offer()
                self.parser.feed_data(rest)
            except httptools.HttpParserUpgrade as offered:  # by a later request
                rest = rest[offered.args[0] :]
            except httptools.HttpParserError as error:
                self.refuse(error)
                return
            else:
                return

    def _parse_without_offer(self) -> None:
        method = self.parser.get_method()
        if method == b"CONNECT":
            detail = "CONNECT asks for a tunnel, and this is no proxy"
            raise httptools.HttpParserCallbackError(detail) from _Unacceptable(HTTPStatus.NOT_IMPLEMENTED, detail)
        head = [method, b" ", self.url, b" HTTP/", self.parser.get_http_version().encode(), b"\r\n"]
        for name, value in self.headers:
            if name != b"upgrade":
                head += (name, b": ", value, b"\r\n")
        head.append(b"\r\n")
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as the parser in its place
        self.parser.feed_data(b"".join(head))

    def _check_older(self, version: str) -> None:
        if version != "1.0":
            raise _Unacceptable(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, f"HTTP/{version}: use HTTP/1.1")
        if any(name == b"transfer-encoding" for name, _ in self.headers):
            detail = "HTTP/1.0 has no Transfer-Encoding: use HTTP/1.1, or send Content-Length alone"
            raise _Unacceptable(HTTPStatus.BAD_REQUEST, detail)
        self.expect_100_continue = False  # a client of 1.0 would take it for the response


def _disconnect(cycle: RequestResponseCycle) -> None:
    cycle.disconnected = True
    cycle.message_event.set()


def _refusal(error: httptools.HttpParserError) -> Response:
    reason = error.__cause__ or error.__context__
    if isinstance(reason, _Unacceptable):
        status, detail = reason.status, str(reason)
    else:
        status, detail = HTTPStatus.BAD_REQUEST, f"not an HTTP/1.1 request (RFC 9112): {error}"
    return problem_response(ProblemRaised(ProblemType.INVALID_REQUEST, detail, status=status).problem)


def _closing_unread(cycle: RequestResponseCycle, app: ASGIApp) -> ASGIApp:
    """``app``, whose connection ends if it answers a client that still waits for ``100 Continue``.

    Such a client may send its body nevertheless or go on with its next request, and nothing tells which of them comes.
    """

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_close(message: Message) -> None:
            if cycle.waiting_for_100_continue and cycle.more_body and not cycle.body:
                cycle.keep_alive = False
            await send(message)

        await app(scope, receive, send_and_close)

    return answering
