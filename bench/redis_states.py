"""Correctness, cache hit rate and latency of answers in each state of Redis.

An installation runs on a dedicated Redis, which is put into each state in turn while documents are edited one by one
and questions about them are asked continuously. Each answer contains the number of the edit that it reflects:

- *stale*: it lacks an edit at or before its ``as_of``;
- *SLO violation*: it lacks an edit that had been searchable for more than one second when the question was asked. The
  index itself is polled, in real time, for when an edit is searchable.

Load generator and servers share the cores: compare latencies with each other only.
"""

import asyncio
import random
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, TypedDict

import httpx
import orjson
import psutil
from redis.asyncio import Redis
from redis.exceptions import RedisError

from bench.installation import BenchInstallation, BenchmarkFailed, installed
from infra.local import Stack, fetch
from infra.opensearch.index import OpenSearchIndex
from query.cache.invalidation_lag import OBJECTIVE_S
from schemas.documents import DocumentKey
from schemas.positions import Position

DOCUMENTS: Final = 40
QUESTIONS: Final = 200
READERS: Final = 4
SKEW: Final = 1.0

_EDIT_EVERY_S: Final = 0.5
_REST_S: Final = 0.005
_READY_S: Final = 30.0
_SLOW_S: Final = 0.03
_SEED: Final = 1
_REJECTED: Final = 503
_OVERLOADED: Final = ("queue is at capacity", "no retrieval slot", "is overloaded")
_UNCACHED: Final = frozenset({"hanging", "down", "evaluators paused"})
_HITS_WITHIN_S: Final = 60.0
_ROOM_CODE: Final = re.compile(r"Room (\d+) has the code c(\d+)\.")

Say = Callable[[str, str], None]


@dataclass(slots=True)
class _RoomEdit:
    number: int
    position: Position
    searchable_s: float | None = None


class StateFigures(TypedDict):
    """Figures of one state. Latencies are None without responses.

    Attributes:
        questions: questions that were not rejected.
        failed: responses other than answers and rejections.
        first_failure: status and body of the first of them.
        rejected: rejected because the service was overloaded, as on a machine with busy cores.
        stale: see module.
        slo_violations: see module.
        hits: cache hits.
        hit_rate: cache hits per answer.
        hit_ms: latency of cache hits.
        other_ms: latency of other answers.
    """

    questions: int
    failed: int
    first_failure: str | None
    rejected: int
    stale: int
    slo_violations: int
    hits: int
    hit_rate: float
    hit_ms: dict[str, float] | None
    other_ms: dict[str, float] | None


class RedisStatesResults(TypedDict):
    """Results of the benchmark, by state."""

    seconds: float
    questions: int
    zipf_s: float
    states: dict[str, StateFigures]


@dataclass(slots=True)
class _StateResults:
    """Results of one state."""

    hit_ms: list[float] = field(default_factory=list)
    other_ms: list[float] = field(default_factory=list)
    failed: int = 0
    first_failure: str | None = None
    rejected: int = 0
    stale: int = 0
    slo_violations: int = 0

    @property
    def answered(self) -> int:
        return len(self.hit_ms) + len(self.other_ms)

    def figures(self) -> StateFigures:
        return {
            "questions": self.answered + self.failed,
            "failed": self.failed,
            "first_failure": self.first_failure,
            "rejected": self.rejected,
            "stale": self.stale,
            "slo_violations": self.slo_violations,
            "hits": len(self.hit_ms),
            "hit_rate": round(len(self.hit_ms) / self.answered, 4) if self.answered else 0.0,
            "hit_ms": _percentiles(self.hit_ms),
            "other_ms": _percentiles(self.other_ms),
        }


async def bench_redis_states(stack: Stack, *, seconds: float, say: Say, hits: int = 0) -> RedisStatesResults:
    """Figures of each state.

    Args:
        stack: a running stack.
        seconds: each state is measured for at least so long.
        say: reports progress.
        hits: where the cache can be used, also until it has served so many hits, but not for more than a minute: how
            soon it serves any depends on the machine.

    Raises:
        BenchmarkFailed: Redis or the installation did not start.
    """
    async with _Servers.running() as servers:
        environment = {"FRESHLINE_REDIS__URL": servers.url, "FRESHLINE_REDIS__TIMEOUT_S": "0.5"}
        async with installed(stack, environment) as installation, _Traffic.running(installation) as traffic:
            figures: dict[str, StateFigures] = {}
            states = servers.states() | {"evaluators paused": lambda: _paused(installation.pids["worker invalidate"])}
            for name, enter in states.items():
                async with enter():
                    say(name, f"{seconds:g} s")
                    least = 0 if name in _UNCACHED else hits
                    figures[name] = (await traffic.measured(seconds, least)).figures()
            return {"seconds": seconds, "questions": QUESTIONS, "zipf_s": SKEW, "states": figures}


class _Servers:
    """The dedicated Redis and its states."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._port = _free_port()
        self._process = self._start(self._port)

    @classmethod
    @asynccontextmanager
    async def running(cls) -> AsyncIterator["_Servers"]:
        with tempfile.TemporaryDirectory(prefix="freshline-bench-") as home:
            servers = cls(Path(home))
            try:
                await servers._ready(servers._port)
                yield servers
            finally:
                servers._end()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    def states(self) -> dict[str, Callable[[], Any]]:
        """In sequence: each state starts from the Redis that the previous one left."""
        return {
            "healthy": self._healthy,
            "slow": self._slow,
            "hanging": self._hanging,
            "out of memory": self._out_of_memory,
            "down": self._down,
            "wiped": self._wiped,
            "failed over": self._failed_over,
            "healthy again": self._healthy,
        }

    @asynccontextmanager
    async def _healthy(self) -> AsyncIterator[None]:
        yield

    @asynccontextmanager
    async def _slow(self) -> AsyncIterator[None]:
        """Redis stalls for 30 ms, repeatedly."""

        async def keep_busy() -> None:
            async with Redis.from_url(self.url) as client:
                while True:
                    await _execute(client, "DEBUG", "SLEEP", str(_SLOW_S))
                    await asyncio.sleep(_REST_S)

        busy = asyncio.create_task(keep_busy())
        try:
            yield
        finally:
            busy.cancel()
            await asyncio.gather(busy, return_exceptions=True)

    @asynccontextmanager
    async def _hanging(self) -> AsyncIterator[None]:
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    @asynccontextmanager
    async def _out_of_memory(self) -> AsyncIterator[None]:
        """The memory limit is reached, without eviction."""
        async with Redis.from_url(self.url) as client:
            used = (await client.info("memory"))["used_memory"]
            await client.config_set("maxmemory", max(used - 1_000_000, 1))
            try:
                yield
            finally:
                await client.config_set("maxmemory", 0)

    @asynccontextmanager
    async def _down(self) -> AsyncIterator[None]:
        self._end()
        try:
            yield
        finally:
            self._process = self._start(self._port)
            await self._ready(self._port)

    @asynccontextmanager
    async def _wiped(self) -> AsyncIterator[None]:
        """All data is lost, connections are kept."""
        async with Redis.from_url(self.url) as client:
            await client.flushall()
        yield

    @asynccontextmanager
    async def _failed_over(self) -> AsyncIterator[None]:
        """A replica is promoted after its primary was killed."""
        port = _free_port()
        replica = self._start(port, "--replicaof", f"127.0.0.1 {self._port}")
        await self._ready(port)
        async with Redis.from_url(f"redis://127.0.0.1:{port}/0") as client:
            async with asyncio.timeout(_READY_S):
                while (await client.info("replication")).get("master_link_status") != "up":  # noqa: ASYNC110 - no notification
                    await asyncio.sleep(_REST_S)
            self._end()
            await _execute(client, "REPLICAOF", "NO", "ONE")
            await client.config_set("port", self._port)
        self._process = replica
        yield

    def _start(self, port: int, *more: str) -> subprocess.Popen[bytes]:
        home = self._home / str(port)
        home.mkdir(exist_ok=True)
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(home)]
        command = [str(fetch.redis_server()), *options, "--enable-debug-command", "local", *more]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603 - our own

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

    async def _ready(self, port: int) -> None:
        async with Redis.from_url(f"redis://127.0.0.1:{port}/0") as client:
            deadline_s = time.monotonic() + _READY_S
            while True:
                with suppress(RedisError):
                    await client.ping()
                    return
                if time.monotonic() > deadline_s:
                    raise BenchmarkFailed("the dedicated Redis did not start")
                await asyncio.sleep(_REST_S)


class _Traffic:
    """One editor and several readers."""

    def __init__(self, installation: BenchInstallation, index: OpenSearchIndex, http: httpx.AsyncClient) -> None:
        self._installation = installation
        self._index = index
        self._http = http
        self._tenant = installation.settings.tenant.default
        self._edits: dict[int, list[_RoomEdit]] = {number: [] for number in range(DOCUMENTS)}
        self._rng = random.Random(_SEED)  # noqa: S311 - a sample
        self._revision = 0
        self._results = _StateResults()
        self._weights = list(accumulate(1 / rank**SKEW for rank in range(1, QUESTIONS + 1)))

    @classmethod
    @asynccontextmanager
    async def running(cls, installation: BenchInstallation) -> AsyncIterator["_Traffic"]:
        index = OpenSearchIndex.open(installation.settings)
        async with httpx.AsyncClient(timeout=30.0) as http:
            traffic = cls(installation, index, http)
            try:
                await asyncio.gather(*(traffic._edit(number) for number in range(DOCUMENTS)))
                async with asyncio.timeout(_READY_S), asyncio.TaskGroup() as group:
                    for number, edits in traffic._edits.items():
                        group.create_task(traffic._note_searchable(edits[0], number))
                yield traffic
            finally:
                await index.close()

    async def measured(self, seconds: float, hits: int) -> _StateResults:
        """Edit and ask for ``seconds``, and until there are so many hits."""
        self._results = _StateResults()
        tasks = [asyncio.create_task(self._repeat(self._ask_one)) for _ in range(READERS)]
        tasks.append(asyncio.create_task(self._repeat(self._edit_one)))
        tasks.append(asyncio.create_task(self._last(seconds, hits)))
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
        return self._results

    async def _last(self, seconds: float, hits: int) -> None:
        await asyncio.sleep(seconds)
        with suppress(TimeoutError):
            async with asyncio.timeout(_HITS_WITHIN_S):
                while len(self._results.hit_ms) < hits:  # noqa: ASYNC110 - other tasks count
                    await asyncio.sleep(_REST_S)

    async def _repeat(self, once: Callable[[], Awaitable[None]]) -> None:
        while True:
            await once()

    async def _edit_one(self) -> None:
        number = self._rng.randrange(DOCUMENTS)
        edit = await self._edit(number)
        if edit is not None:
            await self._note_searchable(edit, number)
        await asyncio.sleep(_EDIT_EVERY_S)

    async def _edit(self, number: int) -> _RoomEdit | None:
        """Upload with a revision of the source, so that edits are accepted without Redis."""
        self._revision += 1
        revision = self._revision
        headers = {"Content-Type": "text/markdown", "Freshline-Revision": str(revision)}
        url = f"{self._installation.ingest_url}/v1/documents/room-{number}.md"
        content = f"Room {number} has the code c{revision}."
        response = await self._http.put(url, content=content, headers=headers)
        if not response.is_success:
            return None
        edit = _RoomEdit(revision, Position.parse(response.json()["position"]))
        self._edits[number].append(edit)
        return edit

    async def _note_searchable(self, edit: _RoomEdit, number: int) -> None:
        key = DocumentKey(self._tenant, f"room-{number}.md")
        while True:
            manifest = (await self._index.manifests([key])).get(key)
            if manifest is not None and manifest.complete and manifest.version >= edit.number:
                edit.searchable_s = time.monotonic()
                return
            await asyncio.sleep(_REST_S)

    async def _ask_one(self) -> None:
        [number] = self._rng.choices(range(QUESTIONS), cum_weights=self._weights)
        room = number % DOCUMENTS
        question = {"query": f"what code does room {room} have {'please ' * (number // DOCUMENTS)}", "top_k": 3}
        asked_s = time.monotonic()
        response = await self._http.post(f"{self._installation.query_url}/v1/query", json=question)
        took_ms = (time.monotonic() - asked_s) * 1_000
        if response.is_success:
            self._evaluate(orjson.loads(response.content), asked_s, took_ms)
        elif response.status_code == _REJECTED and any(one in response.text for one in _OVERLOADED):
            self._results.rejected += 1
        else:
            self._results.failed += 1
            self._results.first_failure = self._results.first_failure or f"{response.status_code}: {response.text}"
        await asyncio.sleep(_REST_S)

    def _evaluate(self, answer: dict[str, Any], asked_s: float, took_ms: float) -> None:
        (self._results.hit_ms if answer["cached"] else self._results.other_ms).append(took_ms)
        reflected = {int(partition): offset for partition, offset in answer["as_of"]["positions"].items()}
        for result in answer["results"]:
            match = _ROOM_CODE.search(result["text"])
            if match is None:
                continue
            missing = [edit for edit in self._edits[int(match[1])] if edit.number > int(match[2])]
            self._results.stale += any(
                reflected.get(edit.position.partition, -1) >= edit.position.offset for edit in missing
            )
            self._results.slo_violations += any(
                edit.searchable_s is not None and edit.searchable_s < asked_s - OBJECTIVE_S for edit in missing
            )


@asynccontextmanager
async def _paused(pid: int) -> AsyncIterator[None]:
    """Redis is healthy, but the evaluators are paused."""
    process = psutil.Process(pid)
    process.suspend()
    try:
        yield
    finally:
        process.resume()


async def _execute(client: Redis, *words: str) -> None:
    execute: Callable[..., Awaitable[object]] = client.execute_command
    await execute(*words)


def _percentiles(times_ms: list[float]) -> dict[str, float] | None:
    if not times_ms:
        return None
    ordered = sorted(times_ms)
    return {name: round(ordered[int(share * (len(ordered) - 1))], 1) for name, share in (("p50", 0.5), ("p99", 0.99))}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
