"""documents.v1 → chunks.v1: fetch the content, parse it, split it.

The step does not read manifests. Another version may be in progress between two steps, so only the step that writes can
determine what a version changes. This makes the step a function of the event alone. No version is superseded here: the
index may still reject the newer one, and then the older one is the newest.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

from typing_extensions import override

from infra.blobs.port import BlobCorrupt, BlobMissing, BlobStore
from infra.kafka.codec import encode_plan
from schemas.documents import MAX_METADATA_ENTRIES, IndexedMetadataValue, Stage
from schemas.documents import Outcome as EventOutcome
from schemas.events import BlobRef, Change, ChunkPlan, DocumentEvent, PlannedChunk
from schemas.positions import Position
from schemas.records import Record
from schemas.topics import MAX_RECORD_BYTES
from streams.core.outcomes import DeadLetter, Finished, Outcome
from streams.core.planned_chunks import dump_chunks
from streams.core.splitting import Splitter
from streams.parsing.emptiness import why_empty
from streams.parsing.parse import ParsedDocument
from streams.parsing.sandbox import ParseFailed, ParserPool
from streams.progress import ProgressReporter
from streams.runner import Step, Task
from streams.topology import StepName

_INLINE_BYTES = MAX_RECORD_BYTES // 2
"""Larger chunk lists are stored in the blob store. The rest of a plan, mostly metadata, fits into the other half."""

_MAX_PASSAGES = 8_000
"""An index change contains the ids that it adds and removes, 29 bytes each. It fits a record even if it also removes
the unfinished passages of two earlier versions."""

_CONTENTS_AT_ONCE = 8
"""Contents of a batch in memory at once. Enough to hide latency; each may be as large as an upload."""

_INLINE_SPLIT_CHARS = 100_000
"""Longest text that is split in the event loop, in at most about 30 ms. Longer texts must not delay other events."""

_DELETED = ParsedDocument(text="", title=None, media_type="")
"""The document of a delete."""


@dataclass(frozen=True, slots=True)
class Prepare(Step):
    """The prepare step.

    Attributes:
        profile: identifies parser, splitter and model; chunks of different profiles never mix.
        report: receives the progress of events.
    """

    blobs: BlobStore
    parsers: ParserPool
    splitter: Splitter
    profile: str
    report: ProgressReporter

    name = StepName.PREPARE

    @override
    async def run(self, tasks: Sequence[Task]) -> AsyncGenerator[Sequence[Outcome], None]:
        async with aclosing(self._read(tasks)) as results:
            async for outcomes in results:
                yield outcomes

    @override
    async def close(self, task: Task, kind: str, reason: str) -> None:
        pass  # attempts of this step leave nothing to undo

    @override
    def give_up(self, task: Task, reason: str) -> tuple[Record, ...]:
        return (self._finished_plan(task, EventOutcome.DEAD_LETTER, reason),)

    async def _read(self, tasks: Sequence[Task]) -> AsyncGenerator[list[Outcome], None]:
        """Outcomes in the order of the tasks. Later tasks start while earlier ones are still being read."""
        slots = asyncio.Semaphore(_CONTENTS_AT_ONCE)
        reading = deque(asyncio.create_task(self._outcome(task, slots), name="read-content") for task in tasks)
        try:
            while reading:
                await reading[0]
                ended: list[Outcome] = []
                while reading and reading[0].done():
                    ended.append(reading.popleft().result())
                yield ended
        finally:
            # No task of this attempt may run during the next one.
            for one in reading:
                one.cancel()
            await asyncio.gather(*reading, return_exceptions=True)

    async def _outcome(self, task: Task, slots: asyncio.Semaphore) -> Outcome:
        event = cast("DocumentEvent", task.message)
        try:
            async with slots:
                plan, chunks = await self.plan(event, self._position(task))
        except ParseFailed as failure:
            return self._dead_letter(task, failure.kind, str(failure))
        except (BlobMissing, BlobCorrupt) as failure:
            return self._dead_letter(task, "content-lost", str(failure))
        dumped = dump_chunks(chunks)
        if len(dumped) <= _INLINE_BYTES:
            plan = plan.model_copy(update={"chunks": tuple(chunks)})
        else:
            plan = plan.model_copy(update={"chunks_blob": await self.blobs.put(dumped)})
        self.report.reached(event, Stage.CHUNKED, plan.chunked_ms)
        return Finished((encode_plan(plan, task.partition, task.traceparent),))

    async def plan(self, event: DocumentEvent, position: str) -> tuple[ChunkPlan, list[PlannedChunk]]:
        """The plan of a document version, still without its chunks, and the chunks.

        Raises:
            ParseFailed: the content cannot be read.
            BlobMissing, BlobCorrupt: the content is lost.
        """
        parsed, chunks, reason = await self._chunks(event)
        update = {
            "title": event.title or parsed.title,
            "content_metadata": _content_metadata(event, parsed),
            "reason": reason,
        }
        return self._plan_without_chunks(event, position).model_copy(update=update), chunks

    async def _chunks(self, event: DocumentEvent) -> tuple[ParsedDocument, list[PlannedChunk], str | None]:
        """The parsed content, its chunks, and the reason if there are none."""
        if event.change is Change.DELETED:
            return _DELETED, [], None
        content = await self.blobs.get(cast("BlobRef", event.content))
        parsed = await self.parsers.parse(content, event.content_type, event.file_name)
        title = event.title or parsed.title
        if len(parsed.text) <= _INLINE_SPLIT_CHARS:
            chunks = self.splitter.split(parsed.text, title)
        else:
            chunks = await asyncio.to_thread(self.splitter.split, parsed.text, title)
        if len(chunks) > _MAX_PASSAGES:
            raise ParseFailed(
                "too-large", f"the document has {len(chunks)} passages, the limit is {_MAX_PASSAGES}: split it"
            )
        return parsed, chunks, None if chunks else why_empty(content, parsed.media_type)

    def _dead_letter(self, task: Task, kind: str, reason: str) -> DeadLetter:
        return DeadLetter(kind, reason, self.give_up(task, reason))

    def _finished_plan(self, task: Task, outcome: EventOutcome, reason: str) -> Record:
        event = cast("DocumentEvent", task.message)
        plan = self._plan_without_chunks(event, self._position(task)).model_copy(
            update={"outcome": outcome, "reason": reason}
        )
        return encode_plan(plan, task.partition, task.traceparent)

    @staticmethod
    def _position(task: Task) -> str:
        return str(Position(task.partition, task.offset))

    def _plan_without_chunks(self, event: DocumentEvent, position: str) -> ChunkPlan:
        return ChunkPlan(
            event=event,
            position=position,
            profile=self.profile,
            chunked_ms=time.time() * 1000,
        )


def _content_metadata(event: DocumentEvent, parsed: ParsedDocument) -> dict[str, IndexedMetadataValue]:
    """Metadata from the content that the sender has not set, up to the maximum number of entries."""
    new = [(name, value) for name, value in parsed.metadata.items() if name not in event.metadata]
    return dict(new[: MAX_METADATA_ENTRIES - len(event.metadata)])
