"""Processes that serve one address tell each other what each of them knows.

Whoever asks that address, for metrics say, is answered by any of them. So each listens on a Unix socket in a directory
that is theirs alone, and the one that was asked asks the others. A request is one line, and its answer all that comes
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
"""Variable of a process that shares an address: the directory, which its parent makes and removes."""

_WAIT_S: Final = 1.0
_SUFFIX: Final = ".sock"

_log = structlog.get_logger(__name__)

Told = Callable[[str], bytes]
"""What this process answers: given what follows the name of a request."""


class PeerProcesses:
    """The processes of one address.

    Args:
        directory: where their sockets are; None where there is one process only.
        pid: of this one.
    """

    def __init__(self, directory: Path | None = None, pid: int | None = None) -> None:
        self._directory = directory
        self.pid: Final = os.getpid() if pid is None else pid

    @classmethod
    def of_this_process(cls) -> "PeerProcesses":
        """As its parent says; none where it was started alone."""
        directory = os.environ.pop(PEERS_DIR, None)
        return cls(Path(directory) if directory else None)

    @property
    def shares(self) -> bool:
        """Whether other processes serve the same address."""
        return self._directory is not None

    @asynccontextmanager
    async def listening(self, told: Mapping[str, Told]) -> AsyncIterator[None]:
        """Answer the others meanwhile.

        Args:
            told: for each name of a request what answers it.
        """
        if self._directory is None:
            yield
            return

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with _closing(writer), suppress(OSError, TimeoutError):
                async with asyncio.timeout(_WAIT_S):
                    name, _, rest = (await reader.readline()).decode(errors="replace").strip().partition(" ")
                    if name in told:
                        writer.write(told[name](rest))
                        await writer.drain()

        own = _socket(self._directory, self.pid)
        try:
            server = await asyncio.start_unix_server(answer, own)
        except OSError as error:  # as where the name of the directory for temporary files is too long for a socket
            _log.warning("siblings_not_told", socket=str(own), reason=str(error))
            yield
            return
        try:
            yield
        finally:
            server.close()
            _remove(own)

    async def ask(self, name: str, rest: str = "") -> dict[int, bytes]:
        """What each of the others answers, by process; who does not within a second is left out."""
        if self._directory is None:
            return {}
        others = [int(path.stem) for path in self._directory.glob(f"*{_SUFFIX}") if path.stem.isdigit()]
        others = sorted(pid for pid in others if pid != self.pid)
        answers = await gather_all([_ask(_socket(self._directory, pid), f"{name} {rest}\n") for pid in others])
        return {pid: answer for pid, answer in zip(others, answers, strict=True) if answer}


async def _ask(sibling: Path, request: str) -> bytes:
    try:
        async with asyncio.timeout(_WAIT_S):
            reader, writer = await asyncio.open_unix_connection(sibling)
            with _closing(writer):
                writer.write(request.encode())
                return await reader.read()
    except ConnectionRefusedError:
        _remove(sibling)  # it was killed, and could not take its socket along
    except (OSError, TimeoutError) as error:
        _log.warning("sibling_silent", socket=str(sibling), reason=str(error) or type(error).__name__)
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
