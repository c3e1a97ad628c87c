"""Load generators: a closed loop of users with think time, and an open loop of arrivals at a fixed rate."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from freshline.loadtest.connection import TRANSPORT_FAILED, Connection, Exchange, Target

LIMIT_S: Final = 30.0
"""Request timeout."""

_POLL_S: Final = 0.05
_OPENING: Final = 100
"""Connections opened concurrently, so that no kernel queue overflows."""

Ask = Callable[[], bytes]
"""Returns the next encoded request."""

Record = Callable[[Exchange], object]


@dataclass(slots=True)
class GeneratorLoad:
    """How busy the generator itself was. A lagging generator distorts its measurement.

    Attributes:
        lags_s: scheduling lag of each sample.
        cpu_s: processor time.
        elapsed_s: wall-clock time over which it was measured.
    """

    lags_s: list[float]
    cpu_s: float = 0.0
    elapsed_s: float = 0.0

    def figures(self) -> dict[str, float]:
        """Figures for the report."""
        lags_s = sorted(self.lags_s) or [0.0]
        return {
            "lag_p50_ms": round(lags_s[len(lags_s) // 2] * 1_000, 2),
            "lag_p99_ms": round(lags_s[int(len(lags_s) * 0.99)] * 1_000, 2),
            "cores": round(self.cpu_s / self.elapsed_s, 3) if self.elapsed_s else 0.0,
        }


async def run_users(
    target: Target,
    ask: Ask,
    record: Record,
    *,
    users: int,
    think_s: float,
    seconds: float,
    ramp_s: float = 0.0,
    seed: int = 0,
) -> None:
    """Closed loop: each user asks, waits for the answer, thinks, and asks again.

    Args:
        target: resource to request.
        ask: returns each request.
        record: called with each exchange.
        users: number of users, each with its own connection.
        think_s: mean of the exponentially distributed think time; 0 for none. It also
            first question, so that users do not start together.
        seconds: duration, after which no request is sent. Pending responses are awaited.
        ramp_s: users start evenly over this time.
        seed: seed of the think times.

    Raises:
        Exception: raised by ``record``, for example for an unreadable response.
    """
    crowd = _Users(ask, record, think_s=think_s, asking=users, seed=seed)
    connections = [Connection(target.address, crowd.ended) for _ in range(users)]
    async with _limited(connections):
        if not think_s:
            await _open(connections)
        crowd.begin(connections, until_s=time.perf_counter() + seconds, ramp_s=ramp_s)
        await crowd.all_done.wait()
    if crowd.failure is not None:
        raise crowd.failure


class _Users:
    """State of ``run_users``."""

    def __init__(self, ask: Ask, record: Record, *, think_s: float, asking: int, seed: int) -> None:
        self._ask = ask
        self._record = record
        self._think_s = think_s
        self._asking = asking
        self._until_s = 0.0
        self._rng = random.Random(seed)  # noqa: S311 - load, not secrets
        self._loop = asyncio.get_running_loop()
        self.all_done = asyncio.Event()
        self.failure: Exception | None = None

    def begin(self, connections: list[Connection], *, until_s: float, ramp_s: float) -> None:
        self._until_s = until_s
        for number, connection in enumerate(connections):
            if ramp_s:
                self._loop.call_later(ramp_s * number / len(connections), self._next_question, connection)
            else:
                self._next_question(connection)

    def ended(self, connection: Connection, exchange: Exchange) -> None:
        try:
            self._record(exchange)
        except Exception as error:  # noqa: BLE001 - raised by run_users
            self.failure = error
            self.all_done.set()
            return
        if exchange.status == TRANSPORT_FAILED and not self._think_s:
            self._loop.call_later(_POLL_S, self._next_question, connection)  # no reconnect storm
        else:
            self._next_question(connection)

    def _next_question(self, connection: Connection) -> None:
        wait_s = self._rng.expovariate(1 / self._think_s) if self._think_s else 0.0
        if time.perf_counter() + wait_s >= self._until_s:
            self._asking -= 1
            if not self._asking:
                self.all_done.set()
        else:
            self._loop.call_later(wait_s, self._send, connection)

    def _send(self, connection: Connection) -> None:
        connection.ask(self._ask())


async def run_arrivals(
    target: Target,
    ask: Ask,
    record: Record,
    *,
    rate_per_s: float,
    seconds: float,
    connections: int,
    seed: int = 0,
) -> None:
    """Open loop: requests arrive at a rate, independent of responses. Latency counts from the due time of a request.

    An arrival without a free connection is recorded as failed.
    """
    rng = random.Random(seed)  # noqa: S311 - load, not secrets
    free: list[Connection] = []
    pending = 0

    def ended(connection: Connection, exchange: Exchange) -> None:
        nonlocal pending
        pending -= 1
        free.append(connection)
        record(exchange)

    opened = [Connection(target.address, ended) for _ in range(connections)]
    async with _limited(opened):
        await _open(opened)
        free.extend(opened)
        due_s = began_s = time.perf_counter()
        while due_s < began_s + seconds:
            wait_s = due_s - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            # Overdue requests are sent together: a lagging generator must not reduce the load.
            while due_s <= time.perf_counter():
                if free:
                    pending += 1
                    free.pop().ask(ask(), due_s=due_s)
                else:
                    record(Exchange(TRANSPORT_FAILED, b"all connections are busy", due_s, 0.0))
                due_s += rng.expovariate(rate_per_s)
            await asyncio.sleep(0)
        while pending:  # noqa: ASYNC110 - ends by the request timeout at the latest
            await asyncio.sleep(_POLL_S)


@asynccontextmanager
async def measure_generator() -> AsyncIterator[GeneratorLoad]:
    """Measure the generator for the duration of the context."""
    generator_load = GeneratorLoad([])

    async def sample() -> None:
        while True:
            due_s = time.perf_counter() + _POLL_S
            await asyncio.sleep(_POLL_S)
            generator_load.lags_s.append(max(0.0, time.perf_counter() - due_s))

    began_s, cpu_s = time.perf_counter(), time.process_time()
    sampling = asyncio.create_task(sample(), name="generator-load")
    try:
        yield generator_load
    finally:
        sampling.cancel()
        generator_load.cpu_s, generator_load.elapsed_s = time.process_time() - cpu_s, time.perf_counter() - began_s


async def _open(connections: list[Connection]) -> None:
    for first in range(0, len(connections), _OPENING):
        await asyncio.gather(*(connection.open() for connection in connections[first : first + _OPENING]))


@asynccontextmanager
async def _limited(connections: list[Connection]) -> AsyncIterator[None]:
    """Apply the request timeout, and close all connections at the end."""

    async def give_up_overdue() -> None:
        while True:
            await asyncio.sleep(1)
            for connection in _overdue(connections, time.perf_counter() - LIMIT_S):
                connection.give_up(f"no response within {LIMIT_S:g} s")

    sampling = asyncio.create_task(give_up_overdue(), name="load-timeouts")
    try:
        yield
    finally:
        sampling.cancel()
        for connection in connections:
            connection.close()


def _overdue(connections: list[Connection], before_s: float) -> Iterator[Connection]:
    return (connection for connection in connections if connection.due_s is not None and connection.due_s < before_s)
