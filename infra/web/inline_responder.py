"""Inline responses: sent by the HTTP protocol itself, without calling the application.

A task, an ASGI scope and two messages take more time than reading an answer from the near cache. Requests without an
inline response are forwarded to the application unchanged.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, cast

import httptools
from typing_extensions import override

from infra.web.http_protocol import HttpProtocol

_MAX_BODY_BYTES: Final = 16_384

_MAX_PER_TURN: Final = 256
"""Maximum number of responses per turn of the event loop. Clients may send their next request within the same turn;
without a limit, timers and other tasks would be delayed by up to a second."""

Headers = list[tuple[bytes, bytes]]


class _Request(NamedTuple):
    url: bytes
    headers: Headers
    body: bytes


@dataclass(slots=True)
class InlineResponder:
    """Responds to POST requests with small JSON bodies.

    Attributes:
        urls: URLs as in the request line.
        answer: returns the JSON of a 200 response for URL, headers (names in lower case) and body; None forwards the
            request to the application. Must not block or raise.
    """

    urls: frozenset[bytes]
    answer: Callable[[bytes, Headers, bytes], bytes | None]
    _waiting: "deque[InlineProtocol]" = field(default_factory=deque)

    def add(self, connection: "InlineProtocol") -> None:
        """Respond on a connection in this turn of the event loop or a later one."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._respond)
        self._waiting.append(connection)

    def _respond(self) -> None:
        for _ in range(min(_MAX_PER_TURN, len(self._waiting))):
            self._waiting[0].decide()
            self._waiting.popleft()  # after decide(), so that add() does not schedule another call
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._respond)


class _Parsed:
    """Parser state of every held request."""

    @staticmethod
    def get_http_version() -> str:
        return "1.1"

    @staticmethod
    def get_method() -> bytes:
        return b"POST"

    @staticmethod
    def should_keep_alive() -> bool:
        return True

    @staticmethod
    def should_upgrade() -> bool:
        return False


_PARSED: Final = cast("Any", _Parsed())


class InlineProtocol(HttpProtocol):
    """``HttpProtocol`` with inline responses.

    The head of a request that may get an inline response is held until its body is complete. It is not held while an
    earlier request of the connection is in progress, or while the client does not read responses.

    Args:
        inline: creates inline responses.
        uvicorns: arguments of uvicorn's protocols.
    """

    def __init__(self, *, inline: InlineResponder, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._inline = inline
        self._held: list[bytes] | None = None
        self._held_bytes = 0
        self._request: _Request | None = None

    @override
    def on_message_begin(self) -> None:
        if self._request is not None:  # the next request is in the same data
            self.decide()
        super().on_message_begin()

    @override
    def on_headers_complete(self) -> None:
        if (
            self.url in self._inline.urls
            and (self.cycle is None or self.cycle.response_complete)
            and not self.pipeline
            and not self.flow.write_paused
            and not self.expect_100_continue
            and self.parser.get_method() == b"POST"
            and self.parser.get_http_version() == "1.1"
            and self.parser.should_keep_alive()
            and not self.parser.should_upgrade()
        ):
            self._held, self._held_bytes = [], 0
        else:
            super().on_headers_complete()

    @override
    def on_body(self, body: bytes) -> None:
        if self._held is None:
            super().on_body(body)
            return
        self._held.append(body)
        self._held_bytes += len(body)
        if self._held_bytes > _MAX_BODY_BYTES:
            held, self._held = self._held, None
            super().on_headers_complete()
            super().on_body(b"".join(held))

    @override
    def on_message_complete(self) -> None:
        if self._held is None:
            super().on_message_complete()
            return
        held, self._held = self._held, None
        headers: Headers = self.scope["headers"]  # type: ignore[assignment]  # without trailers
        self._request = _Request(self.url, headers, held[0] if len(held) == 1 else b"".join(held))
        self._inline.add(self)

    def decide(self) -> None:
        """Respond to the held request or forward it to the application. Without a held request, do nothing."""
        request, self._request = self._request, None
        if request is None or self.transport.is_closing():
            return
        answer = self._inline.answer(*request)
        if answer is None:
            self._forward(request.body)
            return
        head = [b"HTTP/1.1 200 OK\r\n"]
        for name, value in self.server_state.default_headers:
            head += (name, b": ", value, b"\r\n")
        head += (b"content-length: %d\r\ncontent-type: application/json\r\n\r\n" % len(answer), answer)
        self.transport.write(b"".join(head))
        self.on_response_complete()

    @override
    def refuse(self, error: httptools.HttpParserError) -> None:
        self._held = None
        self.decide()  # the preceding request
        super().refuse(error)

    @override
    def shutdown(self) -> None:
        self.decide()  # a held request is not dropped
        super().shutdown()

    def _forward(self, body: bytes) -> None:
        # The parser may be at the next request already, or replaced.
        parser, self.parser = self.parser, _PARSED
        try:
            super().on_headers_complete()
            super().on_body(body)
            super().on_message_complete()
        finally:
            self.parser = parser
