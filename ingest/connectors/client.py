"""Sending documents to the ingest API: many at once, each document's events in order, patient with a busy service."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote

import httpx
import orjson
import stamina
from pydantic import ValidationError

from ingest.connectors.sent_log import SentLog
from ingest.core.attributes import header_name
from ingest.core.changes import DocumentRequest, Removal, Upload
from schemas.documents import Accepted, EventStatus
from schemas.positions import Position
from schemas.problems import Problem

PARALLEL: Final = 16
RETRY_STATUSES: Final = frozenset({429, 502, 503, 504})
RETRY_TIMEOUT_S: Final = 120.0
_LANE_DEPTH: Final = 2
_POLL_FIRST_S: Final = 0.05
_POLL_MAX_S: Final = 1.0


class ServiceUnavailable(Exception):
    """The service did not take an event for as long as one should try."""


class Refused(Exception):
    """The service will not take this event, however often it is sent."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """An event to send.

    Attributes:
        mark: what the log remembers once it is accepted; None forgets the document.
    """

    request: DocumentRequest
    mark: str | None


@dataclass(frozen=True, slots=True)
class Failure:
    """A document that could not be sent, and why."""

    document_id: str
    reason: str


@dataclass(slots=True)
class Summary:
    """What a connector has done so far.

    Attributes:
        sent: uploads accepted.
        skipped: documents that had not changed.
        deleted: deletions accepted.
        failed: documents that were refused; the others do not wait for them.
        positions: partition → last offset accepted.
        last_events: partition → id of the event at that offset.
    """

    sent: int = 0
    skipped: int = 0
    deleted: int = 0
    failed: list[Failure] = field(default_factory=list)
    positions: dict[int, int] = field(default_factory=dict)
    last_events: dict[int, str] = field(default_factory=dict)

    def note_accepted(self, accepted: Accepted, *, deleted: bool) -> None:
        """Count an acceptance."""
        self.deleted += deleted
        self.sent += not deleted
        position = Position.parse(accepted.position)
        if position.offset > self.positions.get(position.partition, -1):
            self.positions[position.partition] = position.offset
            self.last_events[position.partition] = accepted.event_id


_Lane = asyncio.Queue[Outgoing | None]
"""Events of some documents, in order; None ends it."""

Progress = Callable[[Summary], None]
"""Called after each event with the summary so far."""


def no_progress(_summary: Summary) -> None:
    """Tell nobody."""


class IngestClient:
    """The ingest API, as seen by connectors. Make one with ``connect_ingest``."""

    def __init__(self, http: httpx.AsyncClient, *, retry_timeout_s: float = RETRY_TIMEOUT_S) -> None:
        self._http = http
        self._retry_timeout_s = retry_timeout_s

    @property
    def url(self) -> str:
        """Address of the service."""
        return str(self._http.base_url)

    async def send(self, request: DocumentRequest) -> Accepted:
        """Send one event and return what the service promises of it.

        Raises:
            Refused: the service says that it is wrong.
            ServiceUnavailable: it did not take it in time.
        """
        path = _document_path(request.document_id)
        if isinstance(request, Removal):
            response = await self._call("DELETE", path, headers=_revision_header(request.revision))
        else:
            response = await self._call("PUT", path, headers=upload_headers(request), content=request.content)
        return Accepted.model_validate_json(response.content)

    async def send_all(self, outgoing: AsyncIterable[Outgoing], log: SentLog, summary: Summary, told: Progress) -> None:
        """Send everything; what is accepted is noted in ``log`` and ``summary``.

        Events of one document share a lane, and so keep their order.

        Raises:
            ServiceUnavailable: the rest was not sent; a later run goes on from the log.
            Exception: what ``outgoing`` raised, once everything before it is sent.
        """
        lanes = [_Lane(_LANE_DEPTH) for _ in range(PARALLEL)]
        broken: list[Exception] = []

        async def feed() -> None:
            try:
                async for item in outgoing:
                    await lanes[hash(item.request.document_id) % PARALLEL].put(item)
            except Exception as error:  # noqa: BLE001 - raised below
                broken.append(error)
            for lane in lanes:
                await lane.put(None)

        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(feed())
                for lane in lanes:
                    tasks.create_task(self._send_lane(lane, log, summary, told))
        except ExceptionGroup as errors:
            # The first failure ended the others; it alone says why.
            raise errors.exceptions[0] from None
        if broken:
            raise broken[0]

    async def _send_lane(self, lane: _Lane, log: SentLog, summary: Summary, told: Progress) -> None:
        while (item := await lane.get()) is not None:
            try:
                accepted = await self.send(item.request)
            except Refused as error:
                summary.failed.append(Failure(item.request.document_id, str(error)))
            else:
                log.note(item.request.document_id, item.mark)
                summary.note_accepted(accepted, deleted=isinstance(item.request, Removal))
            told(summary)

    async def status(self, event_id: str) -> EventStatus | None:
        """Where an event is; None where the service does not know it (any more)."""
        response = await self._call("GET", f"/v1/events/{event_id}", missing_ok=True)
        return EventStatus.model_validate_json(response.content) if response.is_success else None

    async def knows(self, document_id: str) -> bool:
        """False if the service has never indexed the document."""
        response = await self._call("GET", _document_path(document_id), missing_ok=True)
        return response.is_success

    async def _call(
        self,
        method: str,
        path: str,
        *,
        headers: dict[str, str] | None = None,
        content: bytes | None = None,
        missing_ok: bool = False,
    ) -> httpx.Response:
        try:
            async for attempt in stamina.retry_context(
                on=_retry, attempts=None, timeout=self._retry_timeout_s, wait_max=10.0
            ):
                with attempt:
                    response = await self._http.request(method, path, headers=headers, content=content)
                    if response.status_code in RETRY_STATUSES:
                        response.raise_for_status()
        except httpx.HTTPStatusError as error:
            raise ServiceUnavailable(f"{self.url}: {problem_text(error.response)}") from error
        except httpx.TransportError as error:
            raise ServiceUnavailable(f"{self.url} does not answer ({error!r}): is the service running?") from error
        if not response.is_success and not (missing_ok and response.status_code == httpx.codes.NOT_FOUND):
            raise Refused(problem_text(response))
        return response


@asynccontextmanager
async def connect_ingest(url: str, api_key: str | None = None) -> AsyncIterator[IngestClient]:
    """A client of the service at ``url``."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=PARALLEL, max_keepalive_connections=PARALLEL)
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=30.0) as http:
        yield IngestClient(http)


async def wait_until_applied(client: IngestClient, summary: Summary, *, timeout_s: float) -> Counter[str]:
    """Wait until the last event sent on each partition has ended; then so have those before it.

    Returns:
        How these last events ended: outcome → number of partitions.

    Raises:
        TimeoutError: some had not ended by then; the message names the partitions.
    """
    waiting = dict(summary.last_events)
    outcomes: Counter[str] = Counter()
    pause_s = _POLL_FIRST_S
    try:
        async with asyncio.timeout(timeout_s):
            while waiting:
                for partition, event_id in list(waiting.items()):
                    status = await client.status(event_id)
                    if status is not None and status.outcome is not None:
                        outcomes[status.outcome] += 1
                        del waiting[partition]
                if waiting:
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _POLL_MAX_S)
    except TimeoutError:
        partitions = ", ".join(str(partition) for partition in sorted(waiting))
        raise TimeoutError(
            f"events on partitions {partitions} have not ended within {timeout_s:g} s: are the workers running?"
        ) from None
    return outcomes


async def begin_with(client: IngestClient, log: SentLog) -> None:
    """Forget what was sent to a service that has since lost it all, as one set up anew has."""
    samples = list(log.marks)[:3]
    if samples and not any([await client.knows(document_id) for document_id in samples]):
        log.forget()


def upload_headers(upload: Upload) -> dict[str, str]:
    """The headers that carry an upload's type and attributes."""
    given = upload.attributes
    texts = {
        "title": given.title,
        "source": given.source,
        "groups": ",".join(given.groups) or None,
        "metadata": orjson.dumps(given.metadata).decode() if given.metadata else None,
        "file_name": upload.file_name,
    }
    headers = {header_name(name): header_value(text) for name, text in texts.items() if text is not None}
    return {"Content-Type": upload.content_type} | headers | _revision_header(given.revision)


def header_value(text: str) -> str:
    """Text as a header value: as it is where that is safe and unambiguous, else as RFC 8187 says."""
    plain = text.isascii() and text.isprintable() and text == text.strip() and not text.lower().startswith("utf-8'")
    return text if plain else f"UTF-8''{quote(text, safe='')}"


def problem_text(response: httpx.Response) -> str:
    """What an error response says, in one line."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        return f"HTTP {response.status_code}"
    return f"{problem.title}: {problem.detail}"


def _retry(error: Exception) -> bool | float:
    """Whether trying again may help, and after how many seconds where the service says so."""
    if isinstance(error, httpx.HTTPStatusError):
        advised = error.response.headers.get("retry-after", "")
        return float(advised) if advised.isdecimal() else True
    return isinstance(error, httpx.TransportError)


def _document_path(document_id: str) -> str:
    return f"/v1/documents/{quote(document_id, safe='')}"


def _revision_header(revision: int | None) -> dict[str, str]:
    return {} if revision is None else {header_name("revision"): str(revision)}
