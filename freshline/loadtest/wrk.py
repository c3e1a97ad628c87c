"""wrk, for loads beyond one Python process: https://github.com/wg/wrk."""

import asyncio
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from freshline.loadtest.connection import Target

_SCRIPT: Final = """
-- Weighted requests, from a file of weights, lengths and bytes.
local requests, reached, total = {}, {}, 0
function init(args)
  local file = io.open(args[1], 'rb')
  for line in file:lines() do
    local weight, bytes = line:match('^(%S+) (%d+)$')
    requests[#requests + 1] = file:read(tonumber(bytes))
    total = total + tonumber(weight)
    reached[#reached + 1] = total
  end
  file:close()
  math.randomseed(os.time())
end
function request()
  local drawn, first, last = math.random() * total, 1, #reached
  while first < last do
    local middle = math.floor((first + last) / 2)
    if reached[middle] < drawn then first = middle + 1 else last = middle end
  end
  return requests[first]
end
function done(summary, latency, _)
  local errors = summary.errors
  io.write(string.format(
    '\\nFIGURES {"requests":%d,"duration_us":%d,"connect":%d,"read":%d,"write":%d,"status":%d,"timeout":%d,' ..
    '"mean_us":%f,"p50_us":%d,"p95_us":%d,"p99_us":%d,"max_us":%d}\\n',
    summary.requests, summary.duration, errors.connect, errors.read, errors.write, errors.status, errors.timeout,
    latency.mean, latency:percentile(50), latency:percentile(95), latency:percentile(99), latency.max))
end
"""
_TIMEOUT_S: Final = 30


class WrkUnavailable(Exception):
    """wrk is not installed, or failed."""


async def wrk(
    target: Target, weighted: Sequence[tuple[float, bytes]], *, connections: int, seconds: float, threads: int = 1
) -> dict[str, Any]:
    """Keep every connection busy, without think time.

    Args:
        target: resource to request.
        weighted: (weight, encoded request).
        connections: concurrent connections.
        seconds: duration.
        threads: threads of wrk.

    Raises:
        WrkUnavailable: wrk is not installed, or failed.
    """
    program = shutil.which("wrk")
    if program is None:
        raise WrkUnavailable("wrk is not installed (Debian: apt-get install wrk; macOS: brew install wrk)")
    with tempfile.TemporaryDirectory(prefix="freshline-wrk-") as folder:
        script, requests = await asyncio.to_thread(_write, Path(folder), weighted)
        host, port = target.address
        command = [
            program,
            f"--connections={connections}",
            f"--threads={threads}",
            f"--duration={seconds:.0f}s",
            f"--timeout={_TIMEOUT_S}s",
            f"--script={script}",
            f"http://{host}:{port}{urlsplit(target.url).path}",
            "--",
            str(requests),
        ]
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        output = (await process.communicate())[0].decode()
    line = next((line for line in output.splitlines() if line.startswith("FIGURES ")), None)
    if line is None:
        raise WrkUnavailable(f"wrk failed: {output.strip()[-500:]}")
    figures = json.loads(line.removeprefix("FIGURES "))
    elapsed_s = figures["duration_us"] / 1e6
    failed = {name: figures[name] for name in ("connect", "read", "write", "status", "timeout") if figures[name]}
    return {
        "requests": figures["requests"],
        "answers_per_s": round((figures["requests"] - figures["status"]) / elapsed_s, 1),
        **{f"{name}_ms": round(figures[f"{name}_us"] / 1e3, 2) for name in ("mean", "p50", "p95", "p99", "max")},
        "errors": failed,
    }


def _write(folder: Path, weighted: Sequence[tuple[float, bytes]]) -> tuple[Path, Path]:
    script, requests = folder / "load.lua", folder / "requests"
    script.write_text(_SCRIPT)
    requests.write_bytes(b"".join(b"%f %d\n%b" % (weight, len(one), one) for weight, one in weighted))
    return script, requests
