"""Who asks when: users who think between their questions, and arrivals at a rate that waits for nobody."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from freshline.loadtest.lines import TRANSPORT_FAILED, Exchange, Line, Target

LIMIT_S: Final = 30.0
"""Longest wait for a response; then it counts as failed."""

_LOOK_S: Final = 0.05
_OPENING: Final = 100
"""Connections opened at a time, so that no queue of the kernel overflows."""

Ask = Callable[[], bytes]
"""The next request, ready to be sent."""

Note = Callable[[Exchange], object]


@dataclass(slots=True)
class Strain:
    """How busy the generator itself was: where it is late, it is a part of what it measures.

    Attributes:
        lags_s: how late it woke, each time it looked.
        cpu_s: processor seconds that it used.
        elapsed_s: over these seconds.
    """

    lags_s: list[float]
    cpu_s: float = 0.0
    elapsed_s: float = 0.0

    def figures(self) -> dict[str, float]:
        """What a report says of it."""
        late = sorted(self.lags_s) or [0.0]
        return {
            "lag_p50_ms": round(late[len(late) // 2] * 1_000, 2),
            "lag_p99_ms": round(late[int(len(late) * 0.99)] * 1_000, 2),
            "cores": round(self.cpu_s / self.elapsed_s, 3) if self.elapsed_s else 0.0,
        }


async def users_ask(
    target: Target,
    ask: Ask,
    note: Note,
    *,
    users: int,
    think_s: float,
    seconds: float,
    ramp_s: float = 0.0,
    seed: int = 0,
) -> None:
    """Let each user ask, wait for the answer, think, and ask again.

    Args:
        target: where the connections go.
        ask: makes each request.
        note: told of each exchange.
        users: each has a connection of its own.
        think_s: mean of the time between an answer and the next question, exponentially distributed; 0 for none. The
            first question comes after such a time too, so users do not begin together.
        seconds: after which nobody asks any more; answers that are due are waited for.
        ramp_s: the users come one after the other, evenly over this time.
        seed: of the thinking.

    Raises:
        Exception: what ``note`` raised, of a response that it cannot read for example.
    """
    crowd = _Users(ask, note, think_s=think_s, asking=users, seed=seed)
    lines = [Line(target.address, crowd.ended) for _ in range(users)]
    async with _limited(lines):
        if not think_s:
            await _open(lines)
        crowd.begin(lines, until_s=time.perf_counter() + seconds, ramp_s=ramp_s)
        await crowd.all_done.wait()
    if crowd.failure is not None:
        raise crowd.failure


class _Users:
    """What the users of ``users_ask`` do next."""

    def __init__(self, ask: Ask, note: Note, *, think_s: float, asking: int, seed: int) -> None:
        self._ask = ask
        self._note = note
        self._think_s = think_s
        self._asking = asking
        self._until_s = 0.0
        self._chance = random.Random(seed)  # noqa: S311 - load, not secrets
        self._loop = asyncio.get_running_loop()
        self.all_done = asyncio.Event()
        self.failure: Exception | None = None

    def begin(self, lines: list[Line], *, until_s: float, ramp_s: float) -> None:
        self._until_s = until_s
        for number, line in enumerate(lines):
            if ramp_s:
                self._loop.call_later(ramp_s * number / len(lines), self._next_question, line)
            else:
                self._next_question(line)

    def ended(self, line: Line, exchange: Exchange) -> None:
        try:
            self._note(exchange)
        except Exception as error:  # noqa: BLE001 - raised to whoever waits for the users
            self.failure = error
            self.all_done.set()
            return
        if exchange.status == TRANSPORT_FAILED and not self._think_s:
            self._loop.call_later(_LOOK_S, self._next_question, line)  # not a storm of connections to what is down
        else:
            self._next_question(line)

    def _next_question(self, line: Line) -> None:
        wait_s = self._chance.expovariate(1 / self._think_s) if self._think_s else 0.0
        if time.perf_counter() + wait_s >= self._until_s:
            self._asking -= 1
            if not self._asking:
                self.all_done.set()
        else:
            self._loop.call_later(wait_s, self._send, line)

    def _send(self, line: Line) -> None:
        line.ask(self._ask())


async def arrivals_ask(
    target: Target,
    ask: Ask,
    note: Note,
    *,
    rate_per_s: float,
    seconds: float,
    connections: int,
    seed: int = 0,
) -> None:
    """Ask at a rate, whether there are answers or not; times count from when each request was due.

    An arrival that finds all connections waiting is noted as failed: it would wait outside.
    """
    chance = random.Random(seed)  # noqa: S311 - load, not secrets
    free: list[Line] = []
    under_way = 0

    def ended(line: Line, exchange: Exchange) -> None:
        nonlocal under_way
        under_way -= 1
        free.append(line)
        note(exchange)

    lines = [Line(target.address, ended) for _ in range(connections)]
    async with _limited(lines):
        await _open(lines)
        free.extend(lines)
        due_s = began_s = time.perf_counter()
        while due_s < began_s + seconds:
            wait_s = due_s - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            # Late ones go out together; a late generator must not make a gentle load.
            while due_s <= time.perf_counter():
                if free:
                    under_way += 1
                    free.pop().ask(ask(), due_s=due_s)
                else:
                    note(Exchange(TRANSPORT_FAILED, b"all connections are waiting", due_s, 0.0))
                due_s += chance.expovariate(rate_per_s)
            await asyncio.sleep(0)
        while under_way:  # noqa: ASYNC110 - ends by the limit of each request at the latest
            await asyncio.sleep(_LOOK_S)


@asynccontextmanager
async def straining() -> AsyncIterator[Strain]:
    """Measure the generator while the context lasts."""
    strain = Strain([])

    async def look() -> None:
        while True:
            due_s = time.perf_counter() + _LOOK_S
            await asyncio.sleep(_LOOK_S)
            strain.lags_s.append(max(0.0, time.perf_counter() - due_s))

    began_s, cpu_s = time.perf_counter(), time.process_time()
    looking = asyncio.create_task(look(), name="generator-strain")
    try:
        yield strain
    finally:
        looking.cancel()
        strain.cpu_s, strain.elapsed_s = time.process_time() - cpu_s, time.perf_counter() - began_s


async def _open(lines: list[Line]) -> None:
    for first in range(0, len(lines), _OPENING):
        await asyncio.gather(*(line.open() for line in lines[first : first + _OPENING]))


@asynccontextmanager
async def _limited(lines: list[Line]) -> AsyncIterator[None]:
    """Give up what waits too long; close all at the end."""

    async def look() -> None:
        while True:
            await asyncio.sleep(1)
            for line in _late(lines, time.perf_counter() - LIMIT_S):
                line.give_up(f"no response within {LIMIT_S:g} s")

    looking = asyncio.create_task(look(), name="load-limits")
    try:
        yield
    finally:
        looking.cancel()
        for line in lines:
            line.close()


def _late(lines: list[Line], before_s: float) -> Iterator[Line]:
    return (line for line in lines if line.due_s is not None and line.due_s < before_s)
