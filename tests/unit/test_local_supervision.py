"""Keeping one process: real child processes, a pretended readiness."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from infra.local import keeper as keeping
from infra.local.keeper import Keeper
from infra.local.processes import spawn
from infra.local.servers import Command
from infra.local.state import Phase, ProcessState, StackError

FOREVER = "import signal; print('running', flush=True); signal.pause()"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {FOREVER}"


class Script:
    name = "script"
    address = None

    def __init__(self, code: str, log: Path) -> None:
        self.code = code
        self._log = log

    def prepare(self) -> Command:
        return Command((sys.executable, "-c", self.code))

    async def missing(self) -> str | None:
        started = self._log.exists() and "running" in self._log.read_text(encoding="utf-8")
        return None if started else "it has not said that it runs"


class Watched:
    """A keeper, and a condition to wait on at each change of its state."""

    def __init__(self, code: str, log: Path, *, start_timeout_s: float = 10, grace_s: float = 10) -> None:
        self.script = Script(code, log)
        self.state = ProcessState(name="script", log=log, address=None)
        self._changed = asyncio.Event()
        self.keeper = Keeper(
            self.script, self.state, self._changed.set, start_timeout_s=start_timeout_s, grace_s=grace_s
        )

    @property
    def pid(self) -> int:
        assert self.state.identity is not None
        return self.state.identity.pid

    async def until(self, condition: Callable[[ProcessState], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition(self.state):
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    watched = Watched(FOREVER, tmp_path / "script.log")
    await watched.keeper.start()
    watch = asyncio.create_task(watched.keeper.watch())
    yield watched
    watch.cancel()
    await watched.keeper.stop()


async def test_end_during_the_start_is_an_error_with_the_log(tmp_path: Path) -> None:
    watched = Watched("raise SystemExit('port 1 is taken')", tmp_path / "script.log")
    with pytest.raises(StackError, match=r"(?s)script: ended with exit code 1.*port 1 is taken"):
        await watched.keeper.start()
    assert watched.state.phase is Phase.FAILED


async def test_start_that_takes_too_long_is_an_error_that_names_what_is_missing(tmp_path: Path) -> None:
    silent = "import signal; signal.pause()"
    watched = Watched(silent, tmp_path / "script.log", start_timeout_s=0.2)
    with pytest.raises(StackError, match=r"not ready after 0.2 s: it has not said that it runs"):
        await watched.keeper.start()
    assert not psutil.pid_exists(watched.pid)


async def test_program_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    watched = Watched("", tmp_path / "script.log")
    watched.script.prepare = lambda: Command((str(tmp_path / "nothing"),))  # type: ignore[method-assign]  # a bad path
    with pytest.raises(StackError, match="nothing"):
        await watched.keeper.start()


async def test_crash_is_recorded_and_the_process_started_again(watched: Watched) -> None:
    first = watched.pid
    os.kill(first, signal.SIGKILL)
    await watched.until(lambda state: state.phase is Phase.READY and watched.pid != first)
    assert watched.state.crashes == 1
    assert watched.state.error is not None
    assert "ended by signal 9" in watched.state.error


async def test_restart_on_purpose_is_no_crash(watched: Watched) -> None:
    first = watched.pid
    await watched.keeper.restart()
    await watched.until(lambda state: state.phase is Phase.READY and watched.pid != first)
    assert watched.state.crashes == 0
    assert watched.state.error is None


async def test_crash_after_crash_is_given_up(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "BACKOFF_S", 0.001)
    watched.script.code = "raise SystemExit(7)"
    os.kill(watched.pid, signal.SIGKILL)
    await watched.until(lambda state: state.phase is Phase.FAILED)
    assert watched.state.crashes == keeping.RESTARTS + 1
    assert watched.state.error is not None
    assert "ended with exit code 7" in watched.state.error


async def test_process_that_ignores_the_request_is_killed(tmp_path: Path) -> None:
    watched = Watched(STUBBORN, tmp_path / "script.log", grace_s=0.2)
    await watched.keeper.start()
    await watched.keeper.stop()
    assert watched.state.phase is Phase.STOPPED
    assert not psutil.pid_exists(watched.pid)


async def test_descendants_end_with_the_process(tmp_path: Path) -> None:
    start_another = f"print(subprocess.Popen([sys.executable, '-c', {FOREVER!r}]).pid, flush=True)"
    code = f"import subprocess, sys; {start_another}; {FOREVER}"
    watched = Watched(code, tmp_path / "script.log")
    await watched.keeper.start()
    descendant = psutil.Process(int(watched.state.log.read_text(encoding="utf-8").split()[0]))
    await watched.keeper.stop()
    await asyncio.to_thread(descendant.wait, 10)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_children_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    parent = (
        "import asyncio, sys; from pathlib import Path; from infra.local.processes import spawn, Command\n"
        "async def main():\n"
        f"    child = await spawn(Command((sys.executable, '-c', {FOREVER!r})), Path({str(log)!r}))\n"
        "    print(child.pid, flush=True)\n"
        "    await child.wait()\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        process.kill()
    child.wait(10)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change users")
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
async def test_changing_the_user_keeps_the_child_bound_to_its_parent(tmp_path: Path) -> None:
    code = (
        "import ctypes, os, signal; bound = ctypes.c_int()\n"
        "ctypes.CDLL(None).prctl(2, ctypes.byref(bound))\n"  # 2 is PR_GET_PDEATHSIG
        "print(os.getuid(), os.getgroups(), bound.value == signal.SIGKILL)"
    )
    import pwd  # noqa: PLC0415  not on every platform

    log = tmp_path / "child.log"
    child = await spawn(Command(("/usr/bin/env", "python3", "-c", code), user="nobody"), log)
    assert await child.wait() == 0
    assert log.read_text(encoding="utf-8").split("\n")[0] == f"{pwd.getpwnam('nobody').pw_uid} [] True"
