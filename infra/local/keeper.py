"""Start, restart and stop of one process."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

from infra.local import processes
from infra.local.servers import Command, Supervised
from infra.local.state import Phase, ProcessIdentity, ProcessState, StackError, log_tail

RESTARTS: Final = 3
STEADY_S: Final = 30.0
"""A process that is ready for this time has its crash count reset."""
BACKOFF_S: Final = 0.25
PROBE_INTERVAL_S: Final = 0.1


class Keeper:
    """Starts a process, restarts it after crashes, and stops it.

    Attributes:
        state: state of the process; ``publish`` is called after each change.
        grace_s: time to end after SIGTERM, before it is killed.
    """

    def __init__(
        self,
        process: Supervised,
        state: ProcessState,
        publish: Callable[[], None],
        *,
        start_timeout_s: float,
        grace_s: float,
    ) -> None:
        self.state: Final = state
        self._process = process
        self._publish = publish
        self._start_timeout_s = start_timeout_s
        self._grace_s = grace_s
        self._child: asyncio.subprocess.Process | None = None
        self._restart_asked = False

    async def start(self) -> None:
        """Start the process and wait until it is ready.

        Raises:
            StackError: it could not be started, ended, or timed out; the message includes the end of its log.
        """
        try:
            await self._start()
        except StackError:
            self._enter(Phase.FAILED)
            raise

    async def watch(self) -> None:
        """Restart the process when it ends, up to ``RESTARTS`` consecutive crashes."""
        crashes = 0
        while self._child is not None:
            ready_at_s = asyncio.get_running_loop().time()
            code = await self._child.wait()
            if asyncio.get_running_loop().time() - ready_at_s >= STEADY_S:
                crashes = 0
            if self._restart_asked:
                self._restart_asked = False
            else:
                crashes += 1
                self.state.crashes += 1
                self.state.error = self._report(_ending(code))
            if crashes > RESTARTS:
                self._enter(Phase.FAILED)
                return
            self._enter(Phase.RESTARTING)
            await asyncio.sleep(BACKOFF_S * 2**crashes if crashes else 0)
            with contextlib.suppress(StackError):  # a failed start counts as a crash in the next iteration
                await self._start()

    async def restart(self) -> None:
        """Stop the process; ``watch`` starts it again."""
        if self._child is not None and self._child.returncode is None:
            self._restart_asked = True
            await processes.end(self._child, self._grace_s)

    async def stop(self) -> None:
        """Stop the process permanently, after ``start`` and ``watch`` have ended."""
        if self._child is None or self.state.phase is Phase.FAILED:
            return
        self._enter(Phase.STOPPING)
        await processes.end(self._child, self._grace_s)
        self._enter(Phase.STOPPED)

    async def _start(self) -> None:
        self._enter(Phase.STARTING)
        try:
            command = self._process.prepare()
            if command.first is not None:
                await self._run_first(command, command.first)
            self._child = await processes.spawn(command, self.state.log)
            self.state.identity = ProcessIdentity.of(self._child.pid)
            self._publish()
            await self._until_ready(self._child)
        except (OSError, StackError) as error:
            self.state.error = self._report(str(error))
            if self._child is not None:
                await processes.end(self._child, self._grace_s)
            raise StackError(self.state.error) from error
        self._enter(Phase.READY)

    async def _run_first(self, command: Command, first: tuple[str, ...]) -> None:
        child = await processes.spawn(Command(first, command.env, command.user), self.state.log)
        try:
            code = await child.wait()
        finally:
            await processes.end(child, 0)
        if code != 0:
            raise StackError(f"{_ending(code)} during the preparation of its data directory")

    async def _until_ready(self, child: asyncio.subprocess.Process) -> None:
        deadline_s = asyncio.get_running_loop().time() + self._start_timeout_s
        ended = asyncio.ensure_future(child.wait())
        try:
            while True:
                missing = await self._process.missing()
                if ended.done():  # checked after the probe, to which another process at the same port may respond
                    raise StackError(_ending(ended.result()))
                if missing is None:
                    return
                if asyncio.get_running_loop().time() > deadline_s:
                    raise StackError(f"not ready after {self._start_timeout_s:g} s: {missing}")
                await asyncio.wait({ended}, timeout=PROBE_INTERVAL_S)
        finally:
            ended.cancel()

    def _report(self, problem: str) -> str:
        tail = log_tail(self.state.log)
        return f"{self.state.name}: {problem}" + (f"\nThe end of {self.state.log}:\n{tail}" if tail else "")

    def _enter(self, phase: Phase) -> None:
        self.state.enter(phase)
        self._publish()


def _ending(code: int) -> str:
    return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
