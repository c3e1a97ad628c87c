"""HTTP/1 protocol: uvicorn's, with exactly one response per request and complete bodies only."""

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


class _Rejected(Exception):
    """A well-formed request head that is rejected before the application is called."""

    def __init__(self, status: HTTPStatus, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class _Closed:
    """Replaces the parser after a malformed request, because the start of the next one is unknown."""

    @staticmethod
    def feed_data(_data: bytes) -> None:
        """Discard data."""


_CLOSED: Final = cast("httptools.HttpRequestParser", _Closed())


class HttpProtocol(HttpToolsProtocol):
    """HTTP protocol of all services.

    An ``Upgrade`` header is ignored, as RFC 9110 section 7.8 permits: request and body are read as if the header
    were missing. Because the parser interprets data after such a head as another protocol, the head is parsed again
    without the header.

    The 400 response to a malformed request follows the responses to earlier requests. If the application has already
    received its head, the application receives a disconnect, never a truncated body. Afterwards the connection is
    closed without further reads.
    """

    def __init__(self, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._running: RequestResponseCycle | None = None
        self._upgrade_offered = False
        self._in_body = False

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        # The base class notifies only the last request; an earlier one may be in progress.
        if self._running is not None and not self._running.response_complete:
            _disconnect(self._running)

    @override
    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offered:
            self._read_after_upgrade(memoryview(data)[offered.args[0] :])
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
        """Separate trailers from headers (RFC 9110 section 6.5.1)."""
        self.headers = []

    @override
    def on_message_complete(self) -> None:
        if not self._upgrade_offered:
            self._in_body = False
            super().on_message_complete()

    def refuse(self, error: httptools.HttpParserError) -> None:
        """Send a problem for the request that is being read, after earlier responses, and close the connection."""
        self.parser = _CLOSED
        earlier = self._running
        if self._in_body:
            if self.cycle is not self._running:
                self.pipeline.popleft()  # it is the last queued request
            elif self.cycle.response_started:
                self.transport.close()
                return
            else:
                _disconnect(self.cycle)
                earlier = None
        self.cycle = RequestResponseCycle(
            scope=cast("Any", {"type": "http", "method": "POST"}),  # a method whose responses have bodies
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

    def _read_after_upgrade(self, rest: memoryview) -> None:
        """Read the body of a request with ``Upgrade``; ``rest`` is the data received after its head."""
        while True:
            self._upgrade_offered = False
            try:
                self._parse_without_upgrade()
                self.parser.feed_data(rest)
            except httptools.HttpParserUpgrade as offered:  # by a later request
                rest = rest[offered.args[0] :]
            except httptools.HttpParserError as error:
                self.refuse(error)
                return
            else:
                return

    def _parse_without_upgrade(self) -> None:
        method = self.parser.get_method()
        if method == b"CONNECT":
            detail = "CONNECT is not supported: this server is not a proxy"
            raise httptools.HttpParserCallbackError(detail) from _Rejected(HTTPStatus.NOT_IMPLEMENTED, detail)
        head = [method, b" ", self.url, b" HTTP/", self.parser.get_http_version().encode(), b"\r\n"]
        for name, value in self.headers:
            if name != b"upgrade":
                head += (name, b": ", value, b"\r\n")
        head.append(b"\r\n")
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # like the replaced parser
        self.parser.feed_data(b"".join(head))

    def _check_older(self, version: str) -> None:
        if version != "1.0":
            raise _Rejected(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, f"HTTP/{version}: use HTTP/1.1")
        if any(name == b"transfer-encoding" for name, _ in self.headers):
            detail = "HTTP/1.0 has no Transfer-Encoding: use HTTP/1.1, or send Content-Length only"
            raise _Rejected(HTTPStatus.BAD_REQUEST, detail)
        self.expect_100_continue = False  # an HTTP/1.0 client would interpret it as the response


def _disconnect(cycle: RequestResponseCycle) -> None:
    cycle.disconnected = True
    cycle.message_event.set()


def _refusal(error: httptools.HttpParserError) -> Response:
    reason = error.__cause__ or error.__context__
    if isinstance(reason, _Rejected):
        status, detail = reason.status, str(reason)
    else:
        status, detail = HTTPStatus.BAD_REQUEST, f"not an HTTP/1.1 request (RFC 9112): {error}"
    return problem_response(ProblemRaised(ProblemType.INVALID_REQUEST, detail, status=status).problem)


def _closing_unread(cycle: RequestResponseCycle, app: ASGIApp) -> ASGIApp:
    """``app``, with the connection closed after a response to a client that still waits for ``100 Continue``.

    Such a client may send its body or its next request, and the two cannot be distinguished.
    """

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_close(message: Message) -> None:
            if cycle.waiting_for_100_continue and cycle.more_body and not cycle.body:
                cycle.keep_alive = False
            await send(message)

        await app(scope, receive, send_and_close)

    return answering
