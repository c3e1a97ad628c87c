"""Interface of the local stack. All calls are synchronous."""

import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Final

import psutil
from pydantic import BaseModel, ConfigDict

from infra.local import fetch, processes, servers, supervisor
from infra.local.fetch import Say, quiet
from infra.local.state import Home, Phase, Plan, ProcessState, StackConfig, StackError, StackState, log_tail

POLL_INTERVAL_S: Final = 0.05
STOP_TIMEOUT_S: Final = 60.0
"""Longer than the supervisor takes if it has to kill every process."""


class ProcessStatus(BaseModel):
    """One process of the stack.

    Attributes:
        pid: process id; None if it does not run.
        address: address, if it has one.
        rss_bytes: resident memory; None if it does not run.
        uptime_s: seconds since its start; None if it does not run.
        crashes: unexpected ends since the start of the stack.
        error: description of the last crash, with the end of its log.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    pid: int | None
    state: Phase
    address: str | None
    rss_bytes: int | None
    uptime_s: float | None
    crashes: int
    error: str | None


class StackStatus(BaseModel):
    """State of the stack.

    Attributes:
        state: ``ready`` once all processes were ready; one may have crashed since.
        environment: as returned by ``Stack.environment``; empty unless ready.
        error: reason for which the last start failed, or the stack ended unexpectedly.
    """

    model_config = ConfigDict(frozen=True)

    state: Phase
    processes: tuple[ProcessStatus, ...] = ()
    environment: Mapping[str, str] = {}
    error: str | None = None


class Stack:
    """Kafka, OpenSearch and Redis with a common data directory, and application processes."""

    def __init__(self, config: StackConfig) -> None:
        self.config: Final = config
        self._home = Home(config.data_dir)
        self._supervisor: subprocess.Popen[str] | None = None

    @classmethod
    def open(cls, config: StackConfig | None = None) -> "Stack":
        """The stack of a data directory, running or not. Starts nothing."""
        return cls(config or StackConfig())

    def up(self, *, detach: bool = False, fresh: bool = False, say: Say = quiet) -> StackStatus:
        """Start the stack unless it runs, and wait until it is ready.

        Args:
            detach: the stack outlives this process. Otherwise it ends with this process, or when this object is
                garbage-collected.
            fresh: start with an empty data directory.
            say: receives progress, including downloads.

        Raises:
            StackError: it cannot start, and no process is left; or another stack runs in the data directory.
        """
        if (state := self._running()) is not None:
            self._check_same(state, fresh=fresh)
            return self._await_ready(say)
        programs = fetch.programs(say)
        self._check_layout(fresh=fresh)
        self._home.create()
        launched = self._launch(Plan(config=self.config, programs=programs, detached=detach, fresh=fresh))
        try:
            return self._await_ready(say)
        except BaseException:
            if launched:
                self.down()
            raise

    def down(self) -> None:
        """Stop the stack and wait for the end of all processes. Idempotent."""
        state = self._home.read()
        if state is None:
            return
        if (process := state.supervisor.find()) is not None:
            process.terminate()
            if not _wait(state, STOP_TIMEOUT_S):
                process.kill()
                _wait(state, STOP_TIMEOUT_S)
        if self._supervisor is not None:
            self._supervisor.communicate()
            self._supervisor = None
        for left in (self._home.read() or state).processes:
            if left.identity is not None:
                processes.end_leftover(left.identity)

    def wait(self) -> StackStatus:
        """Wait until the stack has ended."""
        if (state := self._running()) is not None:
            _wait(state, None)
        return self.status()

    def status(self) -> StackStatus:
        """Current state of the stack."""
        state = self._home.read()
        if state is None:
            return StackStatus(state=Phase.STOPPED)
        alive = state.supervisor.find() is not None
        phase, error = state.phase, state.error
        if not alive and phase not in {Phase.STOPPED, Phase.FAILED}:
            phase, error = Phase.FAILED, f"the supervisor was killed; see {self._home.supervisor_log}"
        environment = servers.environment(state, self._home) if phase is Phase.READY else {}
        seen = tuple(_status(process, supervised=alive) for process in state.processes)
        return StackStatus(state=phase, processes=seen, environment=environment, error=error)

    def environment(self) -> dict[str, str]:
        """The ``FRESHLINE_`` variables for the use of this stack.

        Raises:
            StackError: it is not ready.
        """
        status = self.status()
        if status.state is not Phase.READY:
            raise StackError(f"the stack in {self._home.path} is {status.state}, not ready")
        return dict(status.environment)

    def pid(self, name: str) -> int:
        """Process id of a running process, such as ``kafka-1``.

        Raises:
            StackError: the process does not run.
        """
        for process in self.status().processes:
            if process.name == name and process.pid is not None:
                return process.pid
        raise StackError(f"no process {name!r} runs in {self._home.path}")

    def restart(self, name: str) -> None:
        """Restart one process and wait until it is ready.

        Raises:
            StackError: the process does not run, or does not become ready.
        """
        before = self.pid(name)
        state = self._running()
        supervising = state.supervisor.find() if state is not None else None
        if supervising is None:
            raise StackError(f"the stack in {self._home.path} does not run")
        self._home.request_restart(name)
        supervising.send_signal(supervisor.RESTART_SIGNAL)
        while True:  # bounded, because the supervisor limits the time of each start and stop
            current = next(process for process in self.status().processes if process.name == name)
            if current.state is Phase.READY and current.pid not in {before, None}:
                return
            if current.state in {Phase.FAILED, Phase.STOPPED}:
                raise StackError(current.error or f"{name} is {current.state}")
            time.sleep(POLL_INTERVAL_S)

    def _running(self) -> StackState | None:
        state = self._home.read()
        return state if state is not None and state.supervisor.find() is not None else None

    def _check_layout(self, *, fresh: bool) -> None:
        state = self._home.read()
        if state is not None and state.nodes != self.config.nodes and not fresh:
            raise StackError(
                f"{self._home.path} contains the data of a stack with nodes={state.nodes}, not {self.config.nodes}; "
                "start it fresh or choose another data directory"
            )

    def _check_same(self, state: StackState, *, fresh: bool) -> None:
        if fresh:
            raise StackError(f"the stack in {self._home.path} is running; stop it before a fresh start")
        self._check_layout(fresh=False)
        if self.config.ports.items() - state.ports.items():
            raise StackError(
                f"the stack in {self._home.path} is running with other ports: {state.ports}; stop it first"
            )
        if missing := {app.name for app in self.config.apps} - {process.name for process in state.processes}:
            raise StackError(f"the stack in {self._home.path} is running without {', '.join(missing)}; stop it first")

    def _launch(self, plan: Plan) -> bool:
        """Start a supervisor; False if another one is running already."""
        log_file = self._home.supervisor_log
        with log_file.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "infra.local", "supervise"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        if process.stdin is None or process.stdout is None:
            raise AssertionError("pipes are missing")
        process.stdin.write(f"{plan.model_dump_json()}\n")
        process.stdin.flush()
        with process.stdout:
            answer = process.stdout.readline().strip()
        if answer == supervisor.STARTED and not plan.detached:
            self._supervisor = process  # its standard input remains open until this process ends
            return True
        process.communicate()
        if answer not in {supervisor.STARTED, supervisor.TAKEN}:
            raise StackError(f"the supervisor failed. The end of {log_file}:\n{log_tail(log_file)}")
        return answer == supervisor.STARTED

    def _await_ready(self, say: Say) -> StackStatus:
        reported: dict[str, Phase] = {}
        while (state := self._running()) is not None:  # bounded, because the supervisor limits the time of each start
            for process in state.processes:
                if reported.get(process.name) is not process.phase:
                    reported[process.name] = process.phase
                    say(process.name, process.phase)
            if state.phase is Phase.READY:
                return self.status()
            time.sleep(POLL_INTERVAL_S)
        raise StackError(self.status().error or f"the stack in {self._home.path} was stopped during its start")


def _wait(state: StackState, timeout_s: float | None) -> bool:
    """Wait for the end of a supervisor; False at the timeout."""
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    while state.supervisor.find() is not None:
        if deadline_s is not None and time.monotonic() > deadline_s:
            return False
        time.sleep(POLL_INTERVAL_S)
    return True


def _status(process: ProcessState, *, supervised: bool) -> ProcessStatus:
    running = process.identity.find() if process.identity is not None else None
    rss_bytes = uptime_s = None
    if running is not None:
        try:
            rss_bytes, uptime_s = running.memory_info().rss, time.time() - running.create_time()
        except psutil.NoSuchProcess:
            running = None
    ended = process.phase if process.phase in {Phase.STOPPED, Phase.FAILED} else Phase.STOPPED
    return ProcessStatus(
        name=process.name,
        pid=running.pid if running is not None else None,
        state=process.phase if supervised else ended,
        address=process.address,
        rss_bytes=rss_bytes,
        uptime_s=uptime_s,
        crashes=process.crashes,
        error=process.error,
    )
