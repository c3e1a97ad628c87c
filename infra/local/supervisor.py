"""Supervisor: the parent process of all processes of a stack.

It starts the servers together, then the application processes together, and waits until all are ready. It restarts
crashed processes, and stops all in reverse order on SIGTERM or when its caller ends. It publishes its state in a
file. A lock ensures that a data directory has one supervisor.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Final

from infra.local import ports, processes, servers
from infra.local.fetch import cache_dir
from infra.local.keeper import Keeper
from infra.local.state import Home, Phase, Plan, ProcessIdentity, ProcessState, StackError, StackState

STARTED: Final = "started"
TAKEN: Final = "taken"
"""Output to the caller on standard output. No output indicates a failure, which the log contains."""

RESTART_SIGNAL: Final = signal.SIGHUP
APP_GRACE_S: Final = 15.0
SERVER_GRACE_S: Final = 20.0
LOCK_INTERVAL_S: Final = 0.1


class Supervisor:
    """Runs a plan from start to end."""

    def __init__(self, plan: Plan, home: Home) -> None:
        self._plan = plan
        self._home = home
        self._state = StackState(nodes=plan.config.nodes, supervisor=ProcessIdentity.own(), models=plan.programs.models)
        self._servers: list[Keeper] = []
        self._apps: list[Keeper] = []
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, started: Callable[[], None]) -> None:
        """Run until SIGTERM. ``started`` is called when the state file is that of this supervisor."""
        previous_ports = self._take_over()
        self._publish()
        self._listen()
        started()
        stop = asyncio.ensure_future(self._stop.wait())
        up = asyncio.ensure_future(self._bring_up(previous_ports))
        try:
            await asyncio.wait({stop, up}, return_when=asyncio.FIRST_COMPLETED)
            if up.done():
                await up
                self._enter(Phase.READY)
                for keeper in (*self._servers, *self._apps):
                    self._spawn(keeper.watch())
            await stop
        except StackError as error:
            self._state.error = str(error)
        except BaseException:
            self._state.error = f"the supervisor failed; see {self._home.supervisor_log}"
            raise
        finally:
            tasks = (stop, up, *self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._end_all()

    def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        loop.add_signal_handler(RESTART_SIGNAL, self._restart_requested)
        if not self._plan.detached:
            # The caller sends nothing after the plan, so the end of the input is the end of the caller.
            loop.add_reader(sys.stdin.fileno(), self._caller_gone)

    def _caller_gone(self) -> None:
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        self._stop.set()

    def _restart_requested(self) -> None:
        keepers = {keeper.state.name: keeper for keeper in (*self._servers, *self._apps)}
        for request in self._home.restarts.iterdir():
            request.unlink()
            if request.name in keepers:
                self._spawn(keepers[request.name].restart())

    def _take_over(self) -> dict[str, int]:
        """Kill processes that an earlier supervisor has left; returns its ports."""
        earlier = self._home.read()
        for process in earlier.processes if earlier is not None else ():
            if process.identity is not None:
                processes.end_leftover(process.identity)
        if self._plan.fresh:
            self._home.wipe()
        self._home.create()
        return earlier.ports if earlier is not None else {}

    async def _bring_up(self, previous_ports: dict[str, int]) -> None:
        config = self._plan.config
        async with _port_lock():
            self._state.ports = ports.choose(servers.port_names(config.nodes), config.ports, previous_ports)
            environment = servers.environment(self._state, self._home)
            for server in servers.servers(self._plan, self._home, self._state.ports):
                self._servers.append(self._keeper(server, SERVER_GRACE_S))
            for app in config.apps:
                self._apps.append(self._keeper(servers.App(app, environment), APP_GRACE_S))
            self._publish()
            await _start_all(self._servers)
        await _start_all(self._apps)

    def _keeper(self, process: servers.Supervised, grace_s: float) -> Keeper:
        log = self._home.logs / f"{process.name}.log"
        if log.exists():
            log.replace(log.with_suffix(".previous.log"))
        state = ProcessState(name=process.name, log=log, address=process.address)
        self._state.processes.append(state)
        timeout_s = self._plan.config.start_timeout_s
        return Keeper(process, state, self._publish, start_timeout_s=timeout_s, grace_s=grace_s)

    async def _end_all(self) -> None:
        self._enter(Phase.STOPPING)
        await asyncio.gather(*(keeper.stop() for keeper in self._apps))
        await asyncio.gather(*(keeper.stop() for keeper in self._servers))
        self._enter(Phase.FAILED if self._state.error is not None else Phase.STOPPED)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _enter(self, phase: Phase) -> None:
        self._state.phase = phase
        self._publish()

    def _publish(self) -> None:
        self._home.write(self._state)


async def _start_all(keepers: Sequence[Keeper]) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            for keeper in keepers:
                group.create_task(keeper.start())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None  # the others were stopped because of it


@contextlib.asynccontextmanager
async def _port_lock() -> AsyncIterator[None]:
    """Prevents that stacks with the same cache choose the same ports before they listen on them."""
    directory = os.open(cache_dir(), os.O_RDONLY)  # may belong to another user
    try:
        while not _lock(directory):  # noqa: ASYNC110  no event for the release by another process
            await asyncio.sleep(LOCK_INTERVAL_S)
        yield
    finally:
        os.close(directory)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def main() -> None:
    """Read a plan, one line of JSON, from standard input and run it."""
    plan = Plan.model_validate_json(sys.stdin.readline())
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # a broker that does not run yet is no error
    home = Home(plan.config.data_dir)
    with home.lock_file.open("a") as lock:
        if not _lock(lock.fileno()):
            sys.stdout.write(f"{TAKEN}\n")
            return
        if plan.detached and os.fork() > 0:
            os._exit(0)  # the child continues with the lock, detached from the caller
        asyncio.run(_run(plan, home))


async def _run(plan: Plan, home: Home) -> None:
    def started() -> None:
        sys.stdout.write(f"{STARTED}\n")
        sys.stdout.flush()
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    await Supervisor(plan, home).run(started)
