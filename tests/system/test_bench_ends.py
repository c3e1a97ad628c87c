"""A stopped benchmark leaves no process."""

import asyncio
import signal
import sys

import psutil
import pytest

pytestmark = [pytest.mark.stack, pytest.mark.timeout(240)]

LIMIT_S = 90


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
async def test_a_stopped_benchmark_ends_its_processes(stack, number):
    bench = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "freshline", "bench", "redis-states", "--seconds", "60"),
        *("--data", str(stack.config.data_dir)),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            while b"60 s" not in await bench.stderr.readline():
                assert bench.returncode is None
        started = psutil.Process(bench.pid).children(recursive=True)
        assert any("worker" in " ".join(one.cmdline()) for one in started)
        bench.send_signal(number)
        async with asyncio.timeout(LIMIT_S):
            await bench.communicate()
        assert bench.returncode == 130
        assert psutil.wait_procs(started, timeout=0)[1] == []
    finally:
        if bench.returncode is None:
            bench.kill()
            await bench.wait()
