"""Requests between processes that share an address.

Any of the processes may receive a request, such as one for metrics. Each listens on a Unix socket in a common
directory, and the one that receives the request queries its peers. A peer request is one line; its response is all data
until the end of the connection.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final

import structlog

from infra.coalescing import gather_all

PEERS_DIR: Final = "FRESHLINE_PEERS_DIR"
"""Environment variable of a process that shares an address: the directory, created and removed by the parent."""

_TIMEOUT_S: Final = 1.0
_SUFFIX: Final = ".sock"

_log = structlog.get_logger(__name__)

PeerHandler = Callable[[str], bytes]
"""Returns the response to a peer request, given its argument."""


class PeerProcesses:
    """The processes of one address.

    Args:
        directory: directory of their sockets; None for a single process.
        pid: id of this process.
    """

    def __init__(self, directory: Path | None = None, pid: int | None = None) -> None:
        self._directory = directory
        self.pid: Final = os.getpid() if pid is None else pid

    @classmethod
    def of_this_process(cls) -> "PeerProcesses":
        """The peers of this process, as its parent specifies; none for a single process."""
        directory = os.environ.pop(PEERS_DIR, None)
        return cls(Path(directory) if directory else None)

    @property
    def shares(self) -> bool:
        """Whether other processes share the address."""
        return self._directory is not None

    @asynccontextmanager
    async def listening(self, handlers: Mapping[str, PeerHandler]) -> AsyncIterator[None]:
        """Respond to peers within the context.

        Args:
            handlers: handler by name of the request.
        """
        if self._directory is None:
            yield
            return

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with _closing(writer), suppress(OSError, TimeoutError):
                async with asyncio.timeout(_TIMEOUT_S):
                    name, _, argument = (await reader.readline()).decode(errors="replace").strip().partition(" ")
                    if name in handlers:
                        writer.write(handlers[name](argument))
                        await writer.drain()

        own = _socket(self._directory, self.pid)
        try:
            server = await asyncio.start_unix_server(answer, own)
        except OSError as error:  # for example if the path of the directory is too long for a socket
            _log.warning("peer_socket_failed", socket=str(own), reason=str(error))
            yield
            return
        try:
            yield
        finally:
            server.close()
            _remove(own)

    async def ask(self, name: str, argument: str = "") -> dict[int, bytes]:
        """Process id → response of each peer; without peers that do not respond within a second."""
        if self._directory is None:
            return {}
        others = [int(path.stem) for path in self._directory.glob(f"*{_SUFFIX}") if path.stem.isdigit()]
        others = sorted(pid for pid in others if pid != self.pid)
        answers = await gather_all([_ask(_socket(self._directory, pid), f"{name} {argument}\n") for pid in others])
        return {pid: answer for pid, answer in zip(others, answers, strict=True) if answer}


async def _ask(peer: Path, request: str) -> bytes:
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(peer)
            with _closing(writer):
                writer.write(request.encode())
                return await reader.read()
    except ConnectionRefusedError:
        _remove(peer)  # the process was killed and could not remove its socket
    except (OSError, TimeoutError) as error:
        _log.warning("peer_not_responding", socket=str(peer), reason=str(error) or type(error).__name__)
    return b""


def _remove(socket: Path) -> None:
    socket.unlink(missing_ok=True)


def _socket(directory: Path, pid: int) -> Path:
    return directory / f"{pid}{_SUFFIX}"


@contextmanager
def _closing(writer: asyncio.StreamWriter) -> Iterator[None]:
    try:
        yield
    finally:
        writer.close()
