"""Child processes that cannot outlive their parent."""

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
    """A function for the child, which requests SIGKILL at the end of the parent.

    The request is reset when the user changes, so it must follow that; the subprocess module calls this function last.
    It is bound to the thread that starts the child, so children must be started from the main thread. On other systems
    than Linux, the next start kills processes that a killed supervisor has left.
    """

    def ask() -> None:
        if _LIBC is None:
            return
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the request, so no signal will be sent
            os._exit(1)

    return ask


async def spawn(command: Command, log: Path) -> asyncio.subprocess.Process:
    """Start a command in its own session, with output to a log. It ends with this process.

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
            start_new_session=True,  # Ctrl-C is handled by the caller, which stops the processes in order
            preexec_fn=_die_with(os.getpid()),
            user=account.pw_uid if account is not None else None,
            group=account.pw_gid if account is not None else None,
            extra_groups=[] if account is not None else None,
        )


async def end(process: asyncio.subprocess.Process, grace_s: float) -> None:
    """Send SIGTERM to a process and its descendants, SIGKILL after ``grace_s``, and wait for its end."""
    if process.returncode is None:
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), grace_s)
    _signal_group(process.pid, signal.SIGKILL)  # remaining processes of its session
    await process.wait()


def end_leftover(identity: ProcessIdentity) -> None:
    """Kill a process that an ended supervisor has left, if it is still the same process."""
    while identity.find() is not None:
        _signal_group(identity.pid, signal.SIGKILL)
        time.sleep(_POLL_INTERVAL_S)


def _signal_group(leader: int, number: signal.Signals) -> None:
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return
