"""Clients that send documents and ask questions throughout all faults, and the history of what they observed."""

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

from ingest.connectors.client import IngestClient, Rejected, ServiceUnavailable
from ingest.core.changes import DocumentRequest, Removal
from schemas.documents import Accepted

_SENDERS: Final = 4
_SEND_TIMEOUT_S: Final = 12.0
_SEND_RETRY_S: Final = 0.5
_ASK_TIMEOUT_S: Final = 15.0
_READERS: Final = 2
_THINK_S: Final = 0.15
MAX_RESULTS: Final = 50
"""``top_k`` of each question."""
_QUESTIONS: Final = ("How much may a hotel cost?", "Who answers form 7?", "leave", "Ask before travelling abroad")


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """A 202 response.

    Attributes:
        assigned: True if the service assigned the version.
    """

    accepted: Accepted
    deleted: bool
    assigned: bool


@dataclass(slots=True)
class ClientHistory:
    """What the clients observed.

    Attributes:
        acknowledgements: in the order of their 202; also in sending order for each document.
        resent: send attempts without a 202.
        answers: (document that was asked for, or None; response).
        asked: number of questions.
        retried: reason → failed attempts whose retry at the other replica was answered.
        failed: reasons → questions of which both attempts failed.
        slowest_s: longest response time of an answered question.
    """

    acknowledgements: list[Acknowledgement] = field(default_factory=list)
    resent: int = 0
    answers: list[tuple[str | None, dict[str, Any]]] = field(default_factory=list)
    asked: int = 0
    retried: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0


class Senders:
    """Concurrent senders. All events of a document use the same sender, in order."""

    def __init__(
        self, urls: Sequence[str], requests: Iterator[DocumentRequest], rate: float, history: ClientHistory
    ) -> None:
        self._http = [httpx.AsyncClient(base_url=url, timeout=_SEND_TIMEOUT_S, trust_env=False) for url in urls]
        self._clients = [IngestClient(http, retry_timeout_s=_SEND_RETRY_S) for http in self._http]
        self._requests = requests
        self._pause_s = 1 / rate
        self._history = history
        self._sending = asyncio.Event()
        self._queues = [asyncio.Queue[DocumentRequest](maxsize=2) for _ in range(_SENDERS)]

    async def run(self) -> None:
        """Send until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._feed())
                for number, queue in enumerate(self._queues):
                    tasks.create_task(self._send_from(queue, first=number % len(self._clients)))
        finally:
            for http in self._http:
                await http.aclose()

    def go(self) -> None:
        """Start or resume."""
        self._sending.set()

    async def rest(self) -> None:
        """Pause, and wait until everything handed out is acknowledged."""
        self._sending.clear()
        for queue in self._queues:
            await queue.join()

    async def _feed(self) -> None:
        for request in self._requests:
            await self._sending.wait()
            await self._queues[crc32(request.document_id.encode()) % _SENDERS].put(request)
            await asyncio.sleep(self._pause_s)

    async def _send_from(self, queue: asyncio.Queue[DocumentRequest], *, first: int) -> None:
        clients = itertools.cycle((*self._clients[first:], *self._clients[:first]))
        client = next(clients)
        while True:
            request = await queue.get()
            while True:
                try:
                    accepted = await client.send(request)
                except ServiceUnavailable:
                    self._history.resent += 1
                    client = next(clients)  # possibly accepted: a retry is safe
                except Rejected as error:
                    raise AssertionError(f"{request.document_id} was rejected: {error}") from error
                else:
                    break
            deleted = isinstance(request, Removal)
            self._history.acknowledgements.append(Acknowledgement(accepted, deleted, request.revision is None))
            queue.task_done()


class Readers:
    """Clients that ask continuously: any question, or for all passages of one document."""

    def __init__(self, urls: Sequence[str], seed: int, history: ClientHistory) -> None:
        self._urls = urls
        self._rng = random.Random(seed)  # noqa: S311 - no secret
        self._history = history
        self._http = httpx.AsyncClient(timeout=_ASK_TIMEOUT_S, trust_env=False)

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """Ask for the duration of the context."""
        tasks = [asyncio.create_task(self._ask_repeatedly()) for _ in range(_READERS)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._http.aclose()

    async def ask(self, document_id: str | None, **more: Any) -> dict[str, Any] | None:
        """Ask once, with one retry at another replica. None if both fail."""
        question: dict[str, Any] = {"query": self._rng.choice(_QUESTIONS), "top_k": MAX_RESULTS, **more}
        if document_id is not None:
            question["filters"] = {"document_id": document_id}
        began_s = time.monotonic()
        self._history.asked += 1
        reasons: list[str] = []
        for url in self._rng.sample(self._urls, len(self._urls)):
            try:
                response = await self._http.post(f"{url}/v1/query", json=question)
            except httpx.TransportError as error:
                reasons.append(type(error).__name__)
                continue
            if response.is_success:
                self._history.retried.update(reasons)
                self._history.slowest_s = max(self._history.slowest_s, time.monotonic() - began_s)
                answer: dict[str, Any] = response.json()
                self._history.answers.append((document_id, answer))
                return answer
            reasons.append(f"{response.status_code} {response.json().get('detail', '')}")
        self._history.failed[" | ".join(reasons)] += 1
        return None

    async def _ask_repeatedly(self) -> None:
        while True:
            await asyncio.sleep(self._rng.uniform(0, 2 * _THINK_S))
            document_ids = [
                acknowledgement.accepted.document_id for acknowledgement in self._history.acknowledgements[-200:]
            ]
            await self.ask(self._rng.choice([None, *document_ids]) if self._rng.random() < 0.8 else None)  # noqa: PLR2004
