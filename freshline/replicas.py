"""Several query processes behind one address: they take connections from one socket, and are replaced without a gap."""

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from typing import Final

import structlog

from infra.settings import Settings
from infra.telemetry.logging import configure_logging
from infra.web.peers import PEERS_DIR
from infra.web.server import LISTEN_FD, READY_FD, bind

_READY_S: Final = 120.0
_END_S: Final = 60.0
_PAUSES_S: Final = (0.5, 1.0, 2.0, 5.0, 10.0)
"""After a process ended by itself; the last again and again."""

_log = structlog.get_logger(__name__)


class DidNotStart(Exception):
    """A process ended before it was ready, or was not ready in time."""


async def serve_replicas(settings: Settings, count: int, *, options: Sequence[str] = ()) -> None:
    """Run ``count`` query processes until SIGTERM or SIGINT; SIGHUP replaces them, one after the other.

    The socket stays open while they are replaced, so whoever connects is taken by one of them. A process that ends by
    itself is started again.

    Args:
        settings: of the service.
        count: of its processes.
        options: of their command, so that they find the same settings.

    Raises:
        UnsafeBind, CannotListen: see ``infra.web.server.listening``.
        DidNotStart: the first of them did not start.
    """
    configure_logging(settings)
    bound = bind(settings.query, settings)
    peers = tempfile.TemporaryDirectory(prefix="freshline-")
    replicas = [_Replica(number, bound.fileno(), options, peers.name) for number in range(count)]
    loop = asyncio.get_running_loop()
    told, again = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    loop.add_signal_handler(signal.SIGHUP, again.set)
    keeping: list[asyncio.Task[None]] = []
    try:
        for replica in replicas:
            await replica.start()
        keeping = [asyncio.create_task(replica.keep(), name=f"replica-{replica.number}") for replica in replicas]
        _log.info("replicas_serving", processes=count, address=bound.getsockname()[:2])
        ending = asyncio.create_task(told.wait())
        while not told.is_set():
            replacing = asyncio.create_task(again.wait())
            await asyncio.wait((ending, replacing), return_when=asyncio.FIRST_COMPLETED)
            replacing.cancel()
            if again.is_set() and not told.is_set():
                again.clear()
                for replica in replicas:
                    await replica.replace()
    finally:
        for task in keeping:
            task.cancel()
        await asyncio.gather(*(replica.end() for replica in replicas))
        bound.close()
        peers.cleanup()


class _Replica:
    """One place, and the process that has it now."""

    def __init__(self, number: int, listen_fd: int, options: Sequence[str], siblings_dir: str) -> None:
        self.number = number
        self._siblings_dir = siblings_dir
        self._options = options
        self._listen_fd = listen_fd
        self._process: asyncio.subprocess.Process | None = None
        self._changing = asyncio.Lock()

    async def start(self) -> None:
        """Start it; returns when it takes requests."""
        self._process = await self._started()

    async def replace(self) -> None:
        """Have another process in its place before it ends. One that cannot start leaves things as they were."""
        async with self._changing:
            before = self._process
            try:
                self._process = await self._started()
            except DidNotStart as error:
                _log.error("replica_not_replaced", number=self.number, reason=str(error))
                return
            await _end(before)

    async def keep(self) -> None:
        """Start it again whenever it ends by itself."""
        failures = 0
        while True:
            process = self._process
            if process is not None:
                await process.wait()
            async with self._changing:
                if self._process is not process:
                    continue  # it was replaced
                pause_s = _PAUSES_S[min(failures, len(_PAUSES_S) - 1)]
                _log.error("replica_ended", number=self.number, code=process and process.returncode, pause_s=pause_s)
                await asyncio.sleep(pause_s)
                try:
                    self._process, failures = await self._started(), 0
                except DidNotStart as error:
                    self._process, failures = None, failures + 1
                    _log.error("replica_not_started", number=self.number, reason=str(error))

    async def end(self) -> None:
        """End it, requests under way first."""
        await _end(self._process)

    async def _started(self) -> asyncio.subprocess.Process:
        ready, tell = os.pipe()
        os.set_blocking(ready, False)
        own = {LISTEN_FD: str(self._listen_fd), READY_FD: str(tell), PEERS_DIR: self._siblings_dir}
        environment = os.environ | own
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "freshline", "serve", "query", *self._options),
                env=dict(environment),
                pass_fds=(self._listen_fd, tell),
                start_new_session=True,  # Ctrl-C is for this process, which ends the others in order
            )
        finally:
            os.close(tell)
        try:
            async with asyncio.timeout(_READY_S):
                is_ready = await _read(ready)
        except BaseException as error:
            await _end(process)
            if isinstance(error, TimeoutError):
                raise DidNotStart(f"a query process was not ready after {_READY_S:g} s") from None
            raise
        finally:
            os.close(ready)
        if not is_ready:
            raise DidNotStart(f"a query process ended at its start with {await process.wait()}: see its log above")
        return process


async def _read(pipe: int) -> bool:
    """Whether something was written; False where the other end was closed."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(pipe, readable.set)
    try:
        await readable.wait()
        return bool(os.read(pipe, 1))
    finally:
        loop.remove_reader(pipe)


async def _end(process: asyncio.subprocess.Process | None) -> None:
    if process is None or process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(_END_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
