"""Lightweight HTTP/1.1 keep-alive connections: the load generator shares the machine with the system under test."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast
from urllib.parse import urlsplit

import httptools
from typing_extensions import override

TRANSPORT_FAILED: Final = 0
"""Status of a request without a response."""


@dataclass(frozen=True, slots=True)
class Target:
    """The resource that receives the requests.

    Args:
        url: its URL, plain HTTP.
        headers: additional headers of each request.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "127.0.0.1", parts.port or 80

    def request(self, body: bytes, content_type: str = "application/json") -> bytes:
        """Encoded POST request."""
        parts = urlsplit(self.url)
        headers = {
            "Host": parts.netloc,
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
            **self.headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"POST {parts.path or '/'} HTTP/1.1\r\n{head}\r\n".encode() + body


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and its response.

    Attributes:
        status: response status, or ``TRANSPORT_FAILED``.
        body: response body, or the reason of the failure.
        began_s: due time of the request, on the clock of ``time.perf_counter``.
        took_s: time from then to the last byte.
    """

    status: int
    body: bytes
    began_s: float
    took_s: float


class Connection(asyncio.Protocol):
    """A connection for one request at a time. Opened on demand, and reopened after it was closed.

    Args:
        address: host and port.
        ended: called with each exchange.
    """

    def __init__(self, address: tuple[str, int], ended: "Callable[[Connection, Exchange], None]") -> None:
        self._address = address
        self._ended = ended
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._body: list[bytes] = []
        self._connecting: asyncio.Task[None] | None = None
        self.due_s: float | None = None
        """Due time of the pending request, or None."""

    def ask(self, request: bytes, *, due_s: float | None = None) -> None:
        """Send a request now. Its latency counts from its due time."""
        self.due_s = time.perf_counter() if due_s is None else due_s
        if self._transport is not None:
            self._send(request)
        else:
            self._connecting = asyncio.create_task(self._connect(request))

    async def open(self) -> None:
        """Connect before the first request."""
        await asyncio.get_running_loop().create_connection(lambda: self, *self._address)

    def give_up(self, reason: str) -> None:
        """Fail the pending request, and close the connection."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        if self._connecting is not None:
            self._connecting.cancel()
        if self.due_s is not None:
            self._end(TRANSPORT_FAILED, reason.encode())

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    async def _connect(self, request: bytes) -> None:
        try:
            await self.open()
        except OSError as error:
            self._end(TRANSPORT_FAILED, f"cannot connect: {error}".encode())
            return
        self._send(request)

    def _send(self, request: bytes) -> None:
        self._parser, self._body = httptools.HttpResponseParser(self), []
        cast("asyncio.Transport", self._transport).write(request)

    def _end(self, status: int, body: bytes) -> None:
        due_s, self.due_s = cast("float", self.due_s), None
        self._ended(self, Exchange(status, body, due_s, time.perf_counter() - due_s))

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    @override
    def data_received(self, data: bytes) -> None:
        if self.due_s is None:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.give_up(f"not a response: {error}")

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self.due_s is not None:  # an idle connection may be closed at any time
            self._end(TRANSPORT_FAILED, f"connection lost: {exc}".encode())

    def on_body(self, data: bytes) -> None:
        """Parser callback."""
        self._body.append(data)

    def on_message_complete(self) -> None:
        """Parser callback."""
        status = self._parser.get_status_code()
        if not self._parser.should_keep_alive():
            self.close()
        self._end(status, b"".join(self._body))
