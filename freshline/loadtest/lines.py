"""Kept HTTP/1.1 connections at little cost: the load generator shares the machine with what it measures."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast
from urllib.parse import urlsplit

import httptools

TRANSPORT_FAILED: Final = 0
"""Stands for the status of a request that had no response."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go.

    Args:
        url: of the resource, over plain HTTP.
        headers: of each request, besides those that HTTP needs.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "127.0.0.1", parts.port or 80

    def request(self, body: bytes, content_type: str = "application/json") -> bytes:
        """A POST of ``body`` as it is sent."""
        parts = urlsplit(self.url)
        lines = {
            "Host": parts.netloc,
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
            **self.headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"POST {parts.path or '/'} HTTP/1.1\r\n{head}\r\n".encode() + body


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and what came back.

    Attributes:
        status: of the response; ``TRANSPORT_FAILED`` where there was none.
        body: of the response; of a failure, what is known of it.
        began_s: when it was due, on the clock of ``time.perf_counter``.
        took_s: from then to the last byte.
    """

    status: int
    body: bytes
    began_s: float
    took_s: float


class Line(asyncio.Protocol):
    """One connection, which asks one thing at a time; it is opened when it is needed, and again when it was closed.

    Args:
        address: host and port.
        ended: called with each exchange.
    """

    def __init__(self, address: tuple[str, int], ended: "Callable[[Line, Exchange], None]") -> None:
        self._address = address
        self._ended = ended
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._body: list[bytes] = []
        self._connecting: asyncio.Task[None] | None = None
        self.due_s: float | None = None
        """When the request under way was due; None where none is."""

    def ask(self, request: bytes, *, due_s: float | None = None) -> None:
        """Send a request now; its time counts from when it was due."""
        self.due_s = time.perf_counter() if due_s is None else due_s
        if self._transport is not None:
            self._send(request)
        else:
            self._connecting = asyncio.create_task(self._connect(request))

    async def open(self) -> None:
        """Connect before the first request."""
        await asyncio.get_running_loop().create_connection(lambda: self, *self._address)

    def give_up(self, reason: str) -> None:
        """End the request under way as failed, and the connection with it."""
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

    # What asyncio and the parser call.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See ``asyncio.Protocol``."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        if self.due_s is None:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.give_up(f"not a response: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        """See ``asyncio.Protocol``. An idle connection may be closed at any time; one with a request may not."""
        self._transport = None
        if self.due_s is not None:
            self._end(TRANSPORT_FAILED, f"connection lost: {exc}".encode())

    def on_body(self, data: bytes) -> None:
        """A part of the body has come."""
        self._body.append(data)

    def on_message_complete(self) -> None:
        """The response is there."""
        status = self._parser.get_status_code()
        if not self._parser.should_keep_alive():
            self.close()
        self._end(status, b"".join(self._body))
