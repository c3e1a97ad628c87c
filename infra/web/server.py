"""HTTP server with graceful shutdown."""

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
"""Time for requests in progress to finish at a shutdown."""

_BACKLOG: Final = 4_096
"""Connections that wait to be accepted. Thousands of users may reconnect at the same time."""

_KEEP_ALIVE_S: Final = 75
"""Longer than load balancers keep idle connections (60 s), so that they do not send requests on closing ones."""


LISTEN_FD: Final = "FRESHLINE_LISTEN_FD"
"""Environment variable of a process that shares an address: descriptor of the listening socket."""

READY_FD: Final = "FRESHLINE_READY_FD"
"""Environment variable of such a process: descriptor to which it writes when it accepts requests."""

_ACCEPTS: Final = 64
"""Connections accepted per turn of the event loop. Others wait for the next turn or another process."""

_PAUSE_S: Final = 0.5

_log = structlog.get_logger(__name__)


class CannotListen(OSError):
    """The address is in use or not available on this machine."""


class _Acceptor:
    """Accepts many connections per turn of the event loop.

    uvloop accepts one per turn. If a turn handles thousands of requests, new connections would wait for minutes; in a
    test with 5,000 connections, some had no response within ten seconds.

    Args:
        bound: listening socket. It is not closed, because other processes may share it.
        protocol: creates the protocol of a connection.
    """

    def __init__(self, bound: socket.socket, protocol: Callable[[], asyncio.Protocol]) -> None:
        self._bound = bound
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._connecting: set[asyncio.Task[None]] = set()
        self._closed = False
        bound.setblocking(False)  # noqa: FBT003 - positional only
        self._loop.add_reader(bound, self._accept)

    def close(self) -> None:
        """Accept no more connections."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._bound)

    async def wait_closed(self) -> None:
        """Wait until accepted connections have a protocol."""
        await asyncio.gather(*self._connecting, return_exceptions=True)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS):
            try:
                connection, _ = self._bound.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # No descriptors are left. Connections wait in the backlog; an immediate retry would only use the core.
                _log.error("cannot_accept", reason=str(error), pause_s=_PAUSE_S)
                self._loop.remove_reader(self._bound)
                self._loop.call_later(_PAUSE_S, self._resume)
                return
            connecting = self._loop.create_task(self._connect(connection))
            self._connecting.add(connecting)
            connecting.add_done_callback(self._connecting.discard)

    def _resume(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._bound, self._accept)

    async def _connect(self, connection: socket.socket) -> None:
        connection.setblocking(False)  # noqa: FBT003 - as above
        try:
            # Nagle's algorithm would delay small responses by 40 ms.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(self._protocol, connection)
        except OSError:  # the client has disconnected
            connection.close()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which raise the signal again before the caller can clean up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        self.servers = [_Acceptor(one, self._protocol) for one in sockets or ()]  # type: ignore[misc]  # has the methods that uvicorn uses
        self.ready.set()

    def _protocol(self) -> asyncio.Protocol:
        protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol

    @contextmanager
    @override
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def listening(
    app: ASGIApp, http: HttpSettings, settings: Settings, *, inline: InlineResponder | None = None
) -> AsyncIterator[str]:
    """Serve ``app``; yields its base URL once requests are accepted. ``inline`` handles requests before ``app``.

    On exit, no more connections are accepted, and requests in progress have ``GRACE_S`` to finish; afterwards resources
    of ``app`` may be closed. ASGI lifespan events are not sent: the caller owns the resources.

    Raises:
        UnsafeBind: the address is reachable from other machines and no credential is required.
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
    bound = _inherited_socket() or bind(http, settings)
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[bound]), name="http-server")
    try:
        await server.ready.wait()
        host, port = bound.getsockname()[:2]
        _notify_parent()
        yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    finally:
        server.should_exit = True
        await serving
        bound.close()


async def wait_for_shutdown() -> None:
    """Wait for SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    received = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, received.set)
    try:
        await received.wait()
    finally:
        # Now a second signal has its default effect, and ends a shutdown that hangs.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _inherited_socket() -> socket.socket | None:
    """The listening socket of the parent, if the address is shared."""
    descriptor = os.environ.pop(LISTEN_FD, None)
    return None if descriptor is None else socket.socket(fileno=int(descriptor))


def _notify_parent() -> None:
    descriptor = os.environ.pop(READY_FD, None)
    if descriptor is not None:
        os.write(int(descriptor), b"1")
        os.close(int(descriptor))


def bind(http: HttpSettings, settings: Settings) -> socket.socket:
    """A socket that listens at the configured address.

    Raises:
        UnsafeBind: the address is reachable from other machines and no credential is required.
        CannotListen: the address cannot be bound.
    """
    require_safe_bind(http.host, settings)
    # asyncio disables Nagle's algorithm only for sockets with an explicit TCP protocol.
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
