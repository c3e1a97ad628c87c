"""Senders and readers, and what they saw. They keep on through every fault, as people and programs do."""

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from zlib import crc32

import httpx

from ingest.connectors.client import IngestClient, Refused, ServiceUnavailable
from ingest.core.changes import DocumentRequest, Removal
from schemas.documents import Accepted

_LANES: Final = 4
_SEND_TIMEOUT_S: Final = 12.0
_SEND_RETRY_S: Final = 0.5
_ASK_TIMEOUT_S: Final = 15.0
_READERS: Final = 2
_THINK_S: Final = 0.15
MOST_RESULTS: Final = 50
"""Asked for at a time."""
_QUESTIONS: Final = ("How much may a hotel cost?", "Who answers form 7?", "leave", "Ask before travelling abroad")


@dataclass(frozen=True, slots=True)
class Promise:
    """A 202.

    Attributes:
        assigned: True where the version is the service's own.
    """

    accepted: Accepted
    deleted: bool
    assigned: bool


@dataclass(slots=True)
class Seen:
    """What senders and readers saw.

    Attributes:
        promises: in the order of their 202; of one document also in the order of its sending.
        sent_again: attempts to send that got no 202.
        answers: document asked for (None: any), and the response.
        asked: questions.
        repeated: attempts that failed, where the next one, at the other replica, was answered; by reason.
        failed: questions that two attempts did not answer; by reason.
        slowest_s: the longest time that an answered question took.
    """

    promises: list[Promise] = field(default_factory=list)
    sent_again: int = 0
    answers: list[tuple[str | None, dict[str, Any]]] = field(default_factory=list)
    asked: int = 0
    repeated: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0


class Senders:
    """Some lanes, each of which sends one event after the other; all events of a document go through one lane."""

    def __init__(self, urls: Sequence[str], requests: Iterator[DocumentRequest], rate: float, seen: Seen) -> None:
        self._http = [httpx.AsyncClient(base_url=url, timeout=_SEND_TIMEOUT_S, trust_env=False) for url in urls]
        self._clients = [IngestClient(http, retry_timeout_s=_SEND_RETRY_S) for http in self._http]
        self._requests = requests
        self._pause_s = 1 / rate
        self._seen = seen
        self._going = asyncio.Event()
        self._lanes = [asyncio.Queue[DocumentRequest](maxsize=2) for _ in range(_LANES)]

    async def run(self) -> None:
        """Send until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._feed())
                for number, lane in enumerate(self._lanes):
                    tasks.create_task(self._send_lane(lane, first=number % len(self._clients)))
        finally:
            for http in self._http:
                await http.aclose()

    def go(self) -> None:
        """Begin, or go on."""
        self._going.set()

    async def rest(self) -> None:
        """Stop, and wait until everything handed out has its 202."""
        self._going.clear()
        for lane in self._lanes:
            await lane.join()

    async def _feed(self) -> None:
        for request in self._requests:
            await self._going.wait()
            await self._lanes[crc32(request.document_id.encode()) % _LANES].put(request)
            await asyncio.sleep(self._pause_s)

    async def _send_lane(self, lane: asyncio.Queue[DocumentRequest], *, first: int) -> None:
        clients = itertools.cycle((*self._clients[first:], *self._clients[:first]))
        client = next(clients)
        while True:
            request = await lane.get()
            while True:
                try:
                    accepted = await client.send(request)
                except ServiceUnavailable:
                    self._seen.sent_again += 1
                    client = next(clients)  # whether it was taken is not known: sending again is safe
                except Refused as error:
                    raise AssertionError(f"{request.document_id} was refused: {error}") from error
                else:
                    break
            deleted = isinstance(request, Removal)
            self._seen.promises.append(Promise(accepted, deleted, request.revision is None))
            lane.task_done()


class Readers:
    """People who ask all the time: any question, or everything that there is of one document."""

    def __init__(self, urls: Sequence[str], seed: int, seen: Seen) -> None:
        self._urls = urls
        self._rng = random.Random(seed)  # noqa: S311 - no secret
        self._seen = seen
        self._http = httpx.AsyncClient(timeout=_ASK_TIMEOUT_S, trust_env=False)

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """Ask until the context is left."""
        tasks = [asyncio.create_task(self._ask_for_ever()) for _ in range(_READERS)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._http.aclose()

    async def ask(self, document_id: str | None, **more: Any) -> dict[str, Any] | None:
        """Ask once, and once more at another replica where that fails; None where both fail."""
        question: dict[str, Any] = {"query": self._rng.choice(_QUESTIONS), "top_k": MOST_RESULTS, **more}
        if document_id is not None:
            question["filters"] = {"document_id": document_id}
        began_s = time.monotonic()
        self._seen.asked += 1
        reasons: list[str] = []
        for url in self._rng.sample(self._urls, len(self._urls)):
            try:
                response = await self._http.post(f"{url}/v1/query", json=question)
            except httpx.TransportError as error:
                reasons.append(type(error).__name__)
                continue
            if response.is_success:
                self._seen.repeated.update(reasons)
                self._seen.slowest_s = max(self._seen.slowest_s, time.monotonic() - began_s)
                answer: dict[str, Any] = response.json()
                self._seen.answers.append((document_id, answer))
                return answer
            reasons.append(f"{response.status_code} {response.json().get('detail', '')}")
        self._seen.failed[" | ".join(reasons)] += 1
        return None

    async def _ask_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._rng.uniform(0, 2 * _THINK_S))
            known = [promise.accepted.document_id for promise in self._seen.promises[-200:]]
            await self.ask(self._rng.choice([None, *known]) if self._rng.random() < 0.8 else None)  # noqa: PLR2004
