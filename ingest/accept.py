"""Acceptance of events: from a request to a durable record in the stream."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog

from infra.blobs.port import BlobStore
from infra.kafka.port import DocumentLog, Producer, ReadPartition, StreamUnavailable
from infra.opensearch.port import IndexUnavailable
from infra.redis.port import CacheUnavailable, EventStates, Versions
from infra.telemetry.tracing import Tracing
from infra.web.problems import RETRY_AFTER_S, ProblemRaised, as_problem, invalid
from ingest.core.changes import DocumentRequest, Upload
from ingest.event_log import EventLog, new_event_id
from ingest.metrics import IngestMetrics
from schemas.documents import MAX_VERSION, Accepted, DocumentKey
from schemas.events import Change, DocumentEvent
from schemas.index import Manifest
from schemas.ownership import other_owner, owner_refusal
from schemas.problems import InvalidField, ProblemType

PARALLEL_ITEMS: Final = 32
"""Documents of a batch that are accepted concurrently. Bounded, so that a batch does not starve other requests."""

_log = structlog.get_logger(__name__)


class Documents(Protocol):
    """Part of the index that the ingest service reads."""

    async def manifests(self, keys: Sequence[DocumentKey]) -> Mapping[DocumentKey, Manifest]:
        """Manifests of the indexed documents among ``keys``."""
        ...

    async def count_chunks(self, key: DocumentKey) -> int:
        """Number of searchable passages of a document."""
        ...

    async def live_documents(
        self, tenant: str, *, connector: str | None, after: str | None, limit: int
    ) -> Sequence[Manifest]:
        """A page of the tenant's live documents, ordered by id."""
        ...


class AppliedPositions(Protocol):
    """Part of the answer cache with the positions that invalidation has applied."""

    async def positions(self, tenant: str) -> Mapping[int, int]:
        """Partition → last applied offset."""
        ...


@dataclass(frozen=True, slots=True)
class Stores:
    """Stores of the ingest service."""

    blobs: BlobStore
    producer: Producer
    versions: Versions
    states: EventStates
    index: Documents
    answers: AppliedPositions
    read_partition: ReadPartition
    log: DocumentLog
    tracing: Tracing = field(default_factory=Tracing)


class Acceptance:
    """Converts requests to events in the stream.

    The order of the steps gives the guarantee: 1. store the content, 2. assign the version, 3. append the event to the
    stream on all in-sync replicas, 4. record its state. A failure before 3 leaves at most an unreferenced blob. A
    failure of 4 does not fail the request: the stream is the source of truth.
    """

    def __init__(self, stores: Stores, metrics: IngestMetrics) -> None:
        self._stores = stores
        self._metrics = metrics
        self._event_log = EventLog(stores.producer, stores.states, stores.tracing)
        self._index_unavailable = False

    async def accept(self, tenant: str, request: DocumentRequest, traceparent: str | None = None) -> Accepted:
        """Accept an event. It is durable on return.

        Raises:
            ProblemRaised: no version can be assigned, or another connector owns the document.
            StreamUnavailable: not acknowledged. It may be in the stream nevertheless; a retry is safe.
            BlobStoreUnavailable: the content could not be stored.
        """
        [conflict] = await self._conflicts(tenant, [request])
        return await self._accept_checked(tenant, request, conflict, traceparent)

    async def accept_many(
        self, tenant: str, requests: Sequence[DocumentRequest], traceparent: str | None = None
    ) -> list[Accepted | Exception]:
        """Accept several events; returns a result for each, in order.

        Documents are processed concurrently, events of one document sequentially. After a ``StreamUnavailable``, the
        events that have not started are not attempted: each would run into the same timeout.
        """
        lanes: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            lanes[request.document_id].append(number)
        outcomes: list[Accepted | Exception] = [StreamUnavailable("not attempted")] * len(requests)
        conflicts = await self._conflicts(tenant, requests)
        slots = asyncio.Semaphore(PARALLEL_ITEMS)
        stream_is_down = False

        async def run(lane: list[int]) -> None:
            nonlocal stream_is_down
            async with slots:
                for number in lane:
                    if stream_is_down:
                        return
                    try:
                        outcomes[number] = await self._accept_checked(
                            tenant, requests[number], conflicts[number], traceparent
                        )
                    except StreamUnavailable as error:
                        stream_is_down, outcomes[number] = True, error
                    except Exception as error:  # noqa: BLE001 - each item has an outcome of its own
                        outcomes[number] = error

        await asyncio.gather(*(run(lane) for lane in lanes.values()))
        return outcomes

    async def _accept_checked(
        self, tenant: str, request: DocumentRequest, conflict: ProblemRaised | None, traceparent: str | None
    ) -> Accepted:
        try:
            with self._metrics.seconds.time():
                return await self._accept(tenant, request, conflict, traceparent)
        except Exception as error:
            self._metrics.rejected.labels(as_problem(error).type.rpartition("/")[2]).inc()
            raise

    async def _conflicts(self, tenant: str, requests: Sequence[DocumentRequest]) -> list[ProblemRaised | None]:
        """Ownership conflict of each request with the indexed document, if any.

        An early check for the sender's benefit. The index step makes the final decision, also for documents that are
        not indexed yet or cannot be read now.
        """
        keys = {DocumentKey(tenant, request.document_id) for request in requests if request.connector is not None}
        try:
            indexed = await self._stores.index.manifests(sorted(keys)) if keys else {}
        except IndexUnavailable:
            indexed = {}
        return [_conflict(request, indexed.get(DocumentKey(tenant, request.document_id))) for request in requests]

    async def _accept(
        self, tenant: str, request: DocumentRequest, conflict: ProblemRaised | None, traceparent: str | None
    ) -> Accepted:
        if conflict is not None:
            raise conflict
        upload = request if isinstance(request, Upload) else None
        content = await self._stores.blobs.put(upload.content) if upload else None
        version = await self._version(DocumentKey(tenant, request.document_id), request.revision)
        now_ms = time.time_ns() / 1e6
        event = DocumentEvent(
            event_id=new_event_id(now_ms),
            tenant=tenant,
            document_id=request.document_id,
            version=version,
            change=Change.UPSERTED if upload else Change.DELETED,
            accepted_ms=now_ms,
            content=content,
            content_type=upload.content_type if upload else None,
            file_name=upload.file_name if upload else None,
            title=upload.attributes.title if upload else None,
            source=upload.attributes.source if upload else None,
            groups=upload.attributes.groups if upload else (),
            metadata=upload.attributes.metadata if upload else {},
            connector=request.connector,
            take_over=request.take_over,
        )
        accepted = await self._event_log.append(event, traceparent)
        self._metrics.accepted.labels(event.change.value).inc()
        self._metrics.content_bytes.inc(content.size_bytes if content else 0)
        return accepted

    async def _version(self, key: DocumentKey, revision: int | None) -> int:
        """Revision of the source, or a version higher than all earlier ones of the document (I1)."""
        if revision is not None:
            return revision
        now_us = time.time_ns() // 1_000
        try:
            version = (await self._stores.versions.assign([key], now_us=now_us, floors={}))[0]
            if version is None:
                floors = {key: await self._floor(key)}
                version = (await self._stores.versions.assign([key], now_us=now_us, floors=floors))[0]
        except CacheUnavailable as error:
            detail = "Redis, which assigns versions, did not respond in time; retry the request, or send a revision"
            raise ProblemRaised(ProblemType.UNAVAILABLE, detail, retry_after_s=RETRY_AFTER_S) from error
        if version is None or version > MAX_VERSION:
            message = f"the document has the maximum revision, {MAX_VERSION}; use another document id"
            raise invalid("no later version is possible", [InvalidField(field="revision", message=message)])
        return version

    async def _floor(self, key: DocumentKey) -> int:
        """Last indexed version, if Redis has none: a new or inactive document, or data loss in Redis."""
        try:
            manifest = (await self._stores.index.manifests([key])).get(key)
        except IndexUnavailable as error:
            # The time in microseconds exceeds every version assigned before, unless a clock was ahead.
            # Logged once per outage, not once per event.
            if not self._index_unavailable:
                _log.warning("version_floor_skipped", store="index", reason=str(error))
            self._index_unavailable = True
            return 0
        self._index_unavailable = False
        return max(0, manifest.newest_version) if manifest else 0


def _conflict(request: DocumentRequest, manifest: Manifest | None) -> ProblemRaised | None:
    connector = request.connector
    # A claim may still be given up; until it completes, the previous version is current.
    current = manifest.completed if manifest is not None else None
    if connector is None or current is None:
        return None
    owner = other_owner(current, connector, take_over=request.take_over)
    if owner is not None:
        return ProblemRaised(ProblemType.CONFLICT, owner_refusal(request.document_id, owner, connector))
    if (
        request.revision is not None
        and request.revision <= current.version
        and current.connector not in {None, connector}
    ):
        # An older revision of the same source is a replay, and is superseded. This one would never become searchable.
        detail = (
            f"document {request.document_id!r} has version {current.version} of another source: revision "
            f"{request.revision} would never become searchable. Use a prefix for the ids of this source (--prefix), or "
            "send larger revisions or none"
        )
        return ProblemRaised(ProblemType.CONFLICT, detail)
    return None
