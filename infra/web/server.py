"""Listening on a port, and stopping without dropping what is under way."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Final, cast

import structlog
import uvicorn
from starlette.types import ASGIApp
from typing_extensions import override

from infra.settings import HttpSettings, Settings
from infra.web.credentials import require_safe_bind
from infra.web.http_protocol import HttpProtocol
from infra.web.inline_responder import InlineProtocol, InlineResponder

GRACE_S: Final = 10
"""Time that requests under way have to finish after the process was told to stop."""

_BACKLOG: Final = 4_096
"""Connections that wait to be taken: thousands of users may come back at once."""

_KEEP_ALIVE_S: Final = 75
"""Idle connections stay open for longer than load balancers keep theirs (60 s), so no request meets a closing one."""


LISTEN_FD: Final = "FRESHLINE_LISTEN_FD"
"""Variable of a process that shares an address: the descriptor of the socket that listens there."""

READY_FD: Final = "FRESHLINE_READY_FD"
"""Variable of such a process: the descriptor to which it writes once it takes requests."""

_ACCEPTS: Final = 64
"""Connections taken in one turn of the loop; more wait for the next, or for another process."""

_PAUSE_S: Final = 0.5

_log = structlog.get_logger(__name__)


class CannotListen(OSError):
    """The address is taken or is not ours."""


class _Acceptor:
    """Takes connections many at a time.

    uvloop takes one for each turn of the loop. While a turn answers thousands of requests, those who come then would
    wait for minutes; that is how some of 5,000 connections had no answer within ten seconds.

    Args:
        bound: listens, and is not closed here: other processes may take connections from it too.
        protocol: makes what handles one connection.
    """

    def __init__(self, bound: socket.socket, protocol: Callable[[], asyncio.Protocol]) -> None:
        self._bound = bound
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._handing: set[asyncio.Task[None]] = set()
        self._closed = False
        bound.setblocking(False)  # noqa: FBT003 - the only form there is
        self._loop.add_reader(bound, self._accept)

    def close(self) -> None:
        """Take no more."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._bound)

    async def wait_closed(self) -> None:
        """Wait until those that were taken are handed on."""
        await asyncio.gather(*self._handing, return_exceptions=True)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS):
            try:
                connection, _ = self._bound.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # No descriptors are left. The queue keeps who waits; asking again at once would only burn the core.
                _log.error("cannot_accept", reason=str(error), pause_s=_PAUSE_S)
                self._loop.remove_reader(self._bound)
                self._loop.call_later(_PAUSE_S, self._resume)
                return
            handing = self._loop.create_task(self._hand_on(connection))
            self._handing.add(handing)
            handing.add_done_callback(self._handing.discard)

    def _resume(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._bound, self._accept)

    async def _hand_on(self, connection: socket.socket) -> None:
        connection.setblocking(False)  # noqa: FBT003 - as above
        try:
            # Nagle's delays are 40 ms for a small response.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(self._protocol, connection)
        except OSError:  # the other side is gone already
            connection.close()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: it re-raises a signal after serving, before its owner could clean up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.began = asyncio.Event()

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        self.servers = [_Acceptor(one, self._protocol) for one in sockets or ()]  # type: ignore[misc]  # as servers are used
        self.began.set()

    def _protocol(self) -> asyncio.Protocol:
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made

    @contextmanager
    @override
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def listening(
    app: ASGIApp, http: HttpSettings, settings: Settings, *, inline: InlineResponder | None = None
) -> AsyncIterator[str]:
    """Serve ``app``; yields its base URL once requests are taken. ``inline`` is asked before ``app``.

    Leaving the context stops taking connections and waits for requests under way, at most ``GRACE_S``; what ``app``
    uses may be closed after that. ASGI lifespan events are not sent: who builds the parts of ``app`` also ends them.

    Raises:
        UnsafeBind: the address is reachable from elsewhere and no credential is demanded.
        CannotListen: the address cannot be bound.
    """
    config = uvicorn.Config(
        app,
        loop="none",
        http=HttpProtocol if inline is None else cast("Any", partial(InlineProtocol, inline=inline)),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_S,
        timeout_keep_alive=_KEEP_ALIVE_S,
        backlog=_BACKLOG,
    )
    bound = _given() or bind(http, settings)
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[bound]), name="http-server")
    try:
        await server.began.wait()
        host, port = bound.getsockname()[:2]
        _tell_ready()
        yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    finally:
        server.should_exit = True
        await serving
        bound.close()


async def wait_for_shutdown() -> None:
    """Wait for SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    try:
        await told.wait()
    finally:
        # From here on a second signal has its usual effect and ends a shutdown that hangs.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _given() -> socket.socket | None:
    """The socket of whoever started this process to share its address."""
    descriptor = os.environ.pop(LISTEN_FD, None)
    return None if descriptor is None else socket.socket(fileno=int(descriptor))


def _tell_ready() -> None:
    descriptor = os.environ.pop(READY_FD, None)
    if descriptor is not None:
        os.write(int(descriptor), b"1")
        os.close(int(descriptor))


def bind(http: HttpSettings, settings: Settings) -> socket.socket:
    """A socket that listens where the settings say.

    Raises:
        UnsafeBind, CannotListen: see ``listening``.
    """
    require_safe_bind(http.host, settings)
    # asyncio switches Nagle's delays off (40 ms for a small response) only where the protocol is named as TCP.
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((http.host, http.port))
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise CannotListen(
            error.errno, f"cannot listen on {http.host} port {http.port} ({error.strerror}): free it or choose another"
        ) from error
    return bound
