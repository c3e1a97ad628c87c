"""Servers that the service is compared with, while a measurement lasts."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from bench.installation import BenchmarkFailed, Installation, free_port
from freshline.loadtest.lines import Target

_START_S: Final = 30.0
_POLL_S: Final = 0.05


@asynccontextmanager
async def beside(kind: str, installation: Installation, *files: Path) -> AsyncIterator[tuple[Target, int]]:
    """Where a server of ``bench.baselines`` answers, and its process id; it ends with the context.

    Args:
        kind: which one.
        installation: whose settings and servers it uses.
        files: see there.

    Raises:
        BenchmarkFailed: it did not start.
    """
    port = free_port()
    told = (kind, str(port), *map(str, files))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.baselines", *told, env=installation.launcher.environment
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
