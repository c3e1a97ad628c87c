"""Start child processes that cannot outlive their parent, and end them for certain."""

import asyncio
import contextlib
import ctypes
import os
import pwd
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from infra.local.servers import Command
from infra.local.state import ProcessIdentity

_PR_SET_PDEATHSIG: Final = 1
_POLL_INTERVAL_S: Final = 0.02
_LIBC: Final = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _die_with(parent: int) -> Callable[[], None]:
    """What a child runs before its program: ask the kernel for SIGKILL when the parent ends.

    The request is lost when the user changes, so it must come after that; the subprocess machinery calls this last. It
    is tied to the thread that started the child: start children from the main thread. Elsewhere than on Linux the next
    start ends what a killed supervisor left.
    """

    def ask() -> None:
        if _LIBC is None:
            return
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the request was made: nobody will tell us
            os._exit(1)

    return ask


async def spawn(command: Command, log: Path) -> asyncio.subprocess.Process:
    """Start a command in a session of its own, its output appended to a log, bound to this process's life.

    Raises:
        OSError: the program cannot be started.
    """
    account = pwd.getpwnam(command.user) if command.user is not None else None
    with log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            *command.argv,
            env=command.env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C at the terminal is for the caller, who ends us in order
            preexec_fn=_die_with(os.getpid()),
            user=account.pw_uid if account is not None else None,
            group=account.pw_gid if account is not None else None,
            extra_groups=[] if account is not None else None,
        )


async def end(process: asyncio.subprocess.Process, grace_s: float) -> None:
    """Ask a process and its descendants to end, make them after a while, and wait until it has."""
    if process.returncode is None:
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), grace_s)
    _signal_group(process.pid, signal.SIGKILL)  # whatever of its session is left
    await process.wait()


def end_leftover(identity: ProcessIdentity) -> None:
    """Kill what a supervisor that is gone has left, if it is still that process."""
    while identity.find() is not None:
        _signal_group(identity.pid, signal.SIGKILL)
        time.sleep(_POLL_INTERVAL_S)


def _signal_group(leader: int, number: signal.Signals) -> None:
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return
