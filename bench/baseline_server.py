"""Runs a baseline server for the duration of a measurement."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from bench.installation import BenchInstallation, BenchmarkFailed, free_port
from freshline.loadtest.connection import Target

_CHECKOUT: Final = Path(__file__).parents[1]
_START_S: Final = 30.0
_POLL_S: Final = 0.05


@asynccontextmanager
async def baseline_server(
    kind: str, installation: BenchInstallation, *files: Path
) -> AsyncIterator[tuple[Target, int]]:
    """A server of ``bench.baselines``: its target and process id. It ends with the context.

    Args:
        kind: see ``bench.baselines``.
        installation: provides settings and servers.
        files: recorded answers, see ``bench.baselines``.

    Raises:
        BenchmarkFailed: it did not start.
    """
    port = free_port()
    arguments = (kind, str(port), *map(str, files))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.baselines", *arguments, env=installation.launcher.environment, cwd=_CHECKOUT
    )
    try:
        async with asyncio.timeout(_START_S):
            while not await _listens(port):
                if process.returncode is not None:
                    raise BenchmarkFailed(f"the baseline {kind!r} ended with {process.returncode}")
                await asyncio.sleep(_POLL_S)
        yield Target(f"http://127.0.0.1:{port}/v1/query"), process.pid
    except TimeoutError:
        raise BenchmarkFailed(f"the baseline {kind!r} did not start") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True
