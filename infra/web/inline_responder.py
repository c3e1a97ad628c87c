"""Responses that need no application: where all is at hand when the last byte of a request has come.

A task, an ASGI scope and two messages cost more than looking an answer up. What is not answered at once takes the usual
way, as if nothing had looked at it before.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, cast

import httptools
from typing_extensions import override

from infra.web.http_protocol import HttpProtocol

_LONGEST_BYTES: Final = 16_384

_IN_A_TURN: Final = 256
"""Requests answered in one turn of the loop. Clients who are answered while sockets are still read ask again in the
same turn; without a bound, timers and all other work would wait for a second."""

Headers = list[tuple[bytes, bytes]]


class _Request(NamedTuple):
    url: bytes
    headers: Headers
    body: bytes


@dataclass(slots=True)
class InlineResponder:
    """Answers POSTs of short JSON.

    Attributes:
        urls: as they stand in the request line.
        answer: from URL, headers (names in lower case) and body to the JSON to answer with, status 200; None sends the
            request the usual way. Must not block nor raise.
    """

    urls: frozenset[bytes]
    answer: Callable[[bytes, Headers, bytes], bytes | None]
    _waiting: "deque[InlineProtocol]" = field(default_factory=deque)

    def add(self, asking: "InlineProtocol") -> None:
        """Answer soon, in this turn of the loop or one of the next."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._turn)
        self._waiting.append(asking)

    def _turn(self) -> None:
        for _ in range(min(_IN_A_TURN, len(self._waiting))):
            self._waiting[0].decide()
            self._waiting.popleft()  # only now: whoever is added meanwhile must not begin a turn of its own
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._turn)


class _Parsed:
    """What a parser tells of every request that was held back."""

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
    """The protocol of all services, with a look at each request before its task is begun.

    The head of a request that may be answered at once is held back until its body is there. It is not held back while
    an earlier request of the connection is under way, nor while its client does not read.

    Args:
        inline: answers what it can.
        uvicorns: what uvicorn hands to its protocols.
    """

    def __init__(self, *, inline: InlineResponder, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._inline = inline
        self._held: list[bytes] | None = None
        self._held_bytes = 0
        self._request: _Request | None = None

    @override
    def on_message_begin(self) -> None:
        if self._request is not None:  # the next request has come in the same piece
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
        if self._held_bytes > _LONGEST_BYTES:
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
        """Answer the request that waits, or let it go the usual way; nothing happens where none waits any more."""
        request, self._request = self._request, None
        if request is None or self.transport.is_closing():
            return
        answer = self._inline.answer(*request)
        if answer is None:
            self._let_go(request.body)
            return
        head = [b"HTTP/1.1 200 OK\r\n"]
        for name, value in self.server_state.default_headers:
            head += (name, b": ", value, b"\r\n")
        head += (b"content-length: %d\r\ncontent-type: application/json\r\n\r\n" % len(answer), answer)
        self.transport.write(b"".join(head))
        self.on_response_complete()

    @override
    def refuse(self, error: httptools.HttpParserError) -> None:
        """See ``HttpProtocol``. The request before comes first."""
        self._held = None
        self.decide()
        super().refuse(error)

    @override
    def shutdown(self) -> None:
        """See ``HttpProtocol``. A request that waits is not dropped."""
        self.decide()
        super().shutdown()

    def _let_go(self, body: bytes) -> None:
        # By now the parser may be at the next request, or gone.
        parser, self.parser = self.parser, _PARSED
        try:
            super().on_headers_complete()
            super().on_body(body)
            super().on_message_complete()
        finally:
            self.parser = parser
