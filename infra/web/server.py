"""Listening on a port, and stopping without dropping what is under way."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from infra.settings import HttpSettings, Settings
from infra.web.credentials import require_safe_bind

GRACE_S: Final = 10
"""Time that requests under way have to finish after the process was told to stop."""

_BACKLOG: Final = 4_096
"""Connections that wait to be taken: thousands of users may come back at once."""

_KEEP_ALIVE_S: Final = 75
"""Idle connections stay open for longer than load balancers keep theirs (60 s), so no request meets a closing one."""


class CannotListen(OSError):
    """The address is taken or is not ours."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: it re-raises a signal after serving, before its owner could clean up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.began = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.began.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def listening(app: ASGIApp, http: HttpSettings, settings: Settings) -> AsyncIterator[str]:
    """Serve ``app``; yields its base URL once requests are taken.

    Leaving the context stops taking connections and waits for requests under way, at most ``GRACE_S``; what ``app``
    uses may be closed after that. ASGI lifespan events are not sent: who builds the parts of ``app`` also ends them.

    Raises:
        UnsafeBind: the address is reachable from elsewhere and no credential is demanded.
        CannotListen: the address cannot be bound.
    """
    require_safe_bind(http.host, settings)
    config = uvicorn.Config(
        app,
        loop="none",
        http="httptools",
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
    bound = _bind(http)
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[bound]), name="http-server")
    try:
        await server.began.wait()
        host, port = bound.getsockname()[:2]
        yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    finally:
        server.should_exit = True
        await serving
        bound.close()


async def until_told_to_stop() -> None:
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


def _bind(http: HttpSettings) -> socket.socket:
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
