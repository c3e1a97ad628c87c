"""Query processes that accept connections from one shared socket and are replaced without interruption."""

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
"""Backoff after a process ended unexpectedly; the last value repeats."""

_log = structlog.get_logger(__name__)


class DidNotStart(Exception):
    """A process ended before it was ready, or was not ready in time."""


async def serve_replicas(settings: Settings, count: int, *, options: Sequence[str] = ()) -> None:
    """Run ``count`` query processes until SIGTERM or SIGINT. SIGHUP replaces them one by one.

    The socket stays open meanwhile, so connections are always accepted. A process that ends unexpectedly is restarted.

    Args:
        settings: settings of the service.
        count: number of processes.
        options: options of their command, so that they use the same settings.

    Raises:
        UnsafeBind, CannotListen: see ``infra.web.server.listening``.
        DidNotStart: a process did not become ready at the start.
    """
    configure_logging(settings)
    bound = bind(settings.query, settings)
    peers = tempfile.TemporaryDirectory(prefix="freshline-")
    replicas = [_Replica(number, bound.fileno(), options, peers.name) for number in range(count)]
    loop = asyncio.get_running_loop()
    stopping, reloading = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    loop.add_signal_handler(signal.SIGHUP, reloading.set)
    supervising: list[asyncio.Task[None]] = []
    try:
        for replica in replicas:
            await replica.start()
        supervising = [
            asyncio.create_task(replica.supervise(), name=f"replica-{replica.number}") for replica in replicas
        ]
        _log.info("replicas_serving", processes=count, address=bound.getsockname()[:2])
        ending = asyncio.create_task(stopping.wait())
        while not stopping.is_set():
            replacing = asyncio.create_task(reloading.wait())
            await asyncio.wait((ending, replacing), return_when=asyncio.FIRST_COMPLETED)
            replacing.cancel()
            if reloading.is_set() and not stopping.is_set():
                reloading.clear()
                for replica in replicas:
                    await replica.replace()
    finally:
        for task in supervising:
            task.cancel()
        await asyncio.gather(*(replica.end() for replica in replicas))
        bound.close()
        peers.cleanup()


class _Replica:
    """A slot and its current process."""

    def __init__(self, number: int, listen_fd: int, options: Sequence[str], peers_dir: str) -> None:
        self.number = number
        self._peers_dir = peers_dir
        self._options = options
        self._listen_fd = listen_fd
        self._process: asyncio.subprocess.Process | None = None
        self._changing = asyncio.Lock()

    async def start(self) -> None:
        """Start the process. Returns when it is ready."""
        self._process = await self._started()

    async def replace(self) -> None:
        """Start a new process, then end the old one. If the new one does not start, the old one stays."""
        async with self._changing:
            before = self._process
            try:
                self._process = await self._started()
            except DidNotStart as error:
                _log.error("replica_not_replaced", number=self.number, reason=str(error))
                return
            await _end(before)

    async def supervise(self) -> None:
        """Restart the process whenever it ends unexpectedly."""
        failures = 0
        while True:
            process = self._process
            if process is not None:
                await process.wait()
            async with self._changing:
                if self._process is not process:
                    continue  # replaced
                pause_s = _PAUSES_S[min(failures, len(_PAUSES_S) - 1)]
                _log.error("replica_ended", number=self.number, code=process and process.returncode, pause_s=pause_s)
                await asyncio.sleep(pause_s)
                try:
                    self._process, failures = await self._started(), 0
                except DidNotStart as error:
                    self._process, failures = None, failures + 1
                    _log.error("replica_not_started", number=self.number, reason=str(error))

    async def end(self) -> None:
        """End the process after its pending requests."""
        await _end(self._process)

    async def _started(self) -> asyncio.subprocess.Process:
        ready, notify = os.pipe()
        os.set_blocking(ready, False)
        own = {LISTEN_FD: str(self._listen_fd), READY_FD: str(notify), PEERS_DIR: self._peers_dir}
        environment = os.environ | own
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "freshline", "serve", "query", *self._options),
                env=dict(environment),
                pass_fds=(self._listen_fd, notify),
                start_new_session=True,  # Ctrl-C must reach this process only, which ends the others in order
            )
        finally:
            os.close(notify)
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
            raise DidNotStart(f"a query process exited with {await process.wait()}: see its log above")
        return process


async def _read(pipe: int) -> bool:
    """True if the pipe was written to, False if it was closed."""
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
