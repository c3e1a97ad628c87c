"""Acceptance: the one step between a sender and the stream. Afterwards the event cannot be lost."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog

from infra.blobs.port import BlobStore
from infra.kafka.port import DocumentLog, Producer, ReadLane, StreamUnavailable
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
"""Documents of one batch that are accepted at the same time: enough to fill the waits, few enough to stay fair."""

_log = structlog.get_logger(__name__)


class Documents(Protocol):
    """The part of the index that the way in reads."""

    async def manifests(self, keys: Sequence[DocumentKey]) -> Mapping[DocumentKey, Manifest]:
        """See ``DocumentIndex``."""
        ...

    async def count_chunks(self, key: DocumentKey) -> int:
        """See ``SearchIndex``."""
        ...

    async def live_documents(
        self, tenant: str, *, connector: str | None, after: str | None, limit: int
    ) -> Sequence[Manifest]:
        """See ``DocumentIndex``."""
        ...


class AppliedPositions(Protocol):
    """The part of the answer cache that tells which events have gone all the way."""

    async def positions(self, tenant: str) -> Mapping[int, int]:
        """See ``AnswerCache``."""
        ...


@dataclass(frozen=True, slots=True)
class Stores:
    """What the service works with."""

    blobs: BlobStore
    producer: Producer
    versions: Versions
    states: EventStates
    index: Documents
    answers: AppliedPositions
    read_lane: ReadLane
    log: DocumentLog
    tracing: Tracing = field(default_factory=Tracing)


class Acceptance:
    """Turns what senders ask for into events.

    The order is the promise: 1. content is in the blob store, 2. the version is known, 3. all in-sync replicas of the
    stream have the event, 4. its state is recorded. A failure before 3 leaves at most a blob that nothing names; a
    failure after 3 is no failure, since the stream is the truth and the state only tells of it.
    """

    def __init__(self, stores: Stores, metrics: IngestMetrics) -> None:
        self._stores = stores
        self._metrics = metrics
        self._placing = EventLog(stores.producer, stores.states, stores.tracing)
        self._index_is_missing = False

    async def accept(self, tenant: str, request: DocumentRequest, traceparent: str | None = None) -> Accepted:
        """Accept one event; when this returns, it is durable.

        Raises:
            ProblemRaised: no version can be given to it, or another connector owns the document.
            StreamUnavailable: it was not acknowledged; it may be in the stream all the same, and sending again is safe.
            BlobStoreUnavailable: its content could not be stored.
        """
        [conflict] = await self._conflicts(tenant, [request])
        return await self._accept_checked(tenant, request, conflict, traceparent)

    async def accept_many(
        self, tenant: str, requests: Sequence[DocumentRequest], traceparent: str | None = None
    ) -> list[Accepted | Exception]:
        """Accept each as ``accept`` does; the outcomes in their order.

        Documents go side by side, events of one document one after the other. When the stream does not answer, what
        has not begun by then is not tried: each try would wait its full time.
        """
        lanes: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            lanes[request.document_id].append(place)
        outcomes: list[Accepted | Exception] = [StreamUnavailable("not tried")] * len(requests)
        conflicts = await self._conflicts(tenant, requests)
        free = asyncio.Semaphore(PARALLEL_ITEMS)
        stream_is_down = False

        async def run(lane: list[int]) -> None:
            nonlocal stream_is_down
            async with free:
                for place in lane:
                    if stream_is_down:
                        return
                    try:
                        outcomes[place] = await self._accept_checked(
                            tenant, requests[place], conflicts[place], traceparent
                        )
                    except StreamUnavailable as error:
                        stream_is_down, outcomes[place] = True, error
                    except Exception as error:  # noqa: BLE001 - each item has an outcome of its own
                        outcomes[place] = error

        await asyncio.gather(*(run(lane) for lane in lanes.values()))
        return outcomes

    async def _accept_checked(
        self, tenant: str, request: DocumentRequest, conflict: ProblemRaised | None, traceparent: str | None
    ) -> Accepted:
        try:
            with self._metrics.seconds.time():
                return await self._accept(tenant, request, conflict, traceparent)
        except Exception as error:
            self._metrics.refused.labels(as_problem(error).type.rpartition("/")[2]).inc()
            raise

    async def _conflicts(self, tenant: str, requests: Sequence[DocumentRequest]) -> list[ProblemRaised | None]:
        """Per request, why its connector may not change the document as it is indexed now.

        This is for the sender to know at once. What is not indexed yet, or cannot be read, is left to the index step,
        which decides in any case.
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
        accepted = await self._placing.place(event, traceparent)
        self._metrics.accepted.labels(event.change.value).inc()
        self._metrics.content_bytes.inc(content.size_bytes if content else 0)
        return accepted

    async def _version(self, key: DocumentKey, revision: int | None) -> int:
        """The source's revision, or one above every earlier version of the document (I1)."""
        if revision is not None:
            return revision
        now_us = time.time_ns() // 1_000
        try:
            version = (await self._stores.versions.assign([key], now_us=now_us, floors={}))[0]
            if version is None:
                floors = {key: await self._floor(key)}
                version = (await self._stores.versions.assign([key], now_us=now_us, floors=floors))[0]
        except CacheUnavailable as error:
            detail = (
                "Redis, which assigns versions, does not answer; repeat the request, or send a revision of your own"
            )
            raise ProblemRaised(ProblemType.UNAVAILABLE, detail, retry_after_s=RETRY_AFTER_S) from error
        if version is None or version > MAX_VERSION:
            message = f"the document has the largest revision there is, {MAX_VERSION}; use another document id"
            raise invalid("no later version exists", [InvalidField(field="revision", message=message)])
        return version

    async def _floor(self, key: DocumentKey) -> int:
        """The version last indexed, where Redis remembers none: a new or quiet document, or a Redis that lost it."""
        try:
            manifest = (await self._stores.index.manifests([key])).get(key)
        except IndexUnavailable as error:
            # The time in microseconds is above every version assigned before, so long as no clock ran ahead.
            # Once when it stops answering, not once for each event.
            if not self._index_is_missing:
                _log.warning("version_floor_skipped", store="index", reason=str(error))
            self._index_is_missing = True
            return 0
        self._index_is_missing = False
        return max(0, manifest.newest_version) if manifest else 0


def _conflict(request: DocumentRequest, manifest: Manifest | None) -> ProblemRaised | None:
    connector = request.connector
    # A claim may yet be given up: until then, the document is what it was.
    standing = manifest.completed if manifest is not None else None
    if connector is None or standing is None:
        return None
    owner = other_owner(standing, connector, take_over=request.take_over)
    if owner is not None:
        return ProblemRaised(ProblemType.CONFLICT, owner_refusal(request.document_id, owner, connector))
    if (
        request.revision is not None
        and request.revision <= standing.version
        and standing.connector not in {None, connector}
    ):
        # An older revision of the same source is a replay, which is superseded. This one was never searchable, and
        # would not become so.
        detail = (
            f"document {request.document_id!r} has version {standing.version}, which another source gave it: revision "
            f"{request.revision} would never be searchable. Put a prefix before the ids of this source (--prefix), or "
            "send larger revisions, or none"
        )
        return ProblemRaised(ProblemType.CONFLICT, detail)
    return None
