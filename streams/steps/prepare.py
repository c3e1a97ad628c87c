"""documents.v1 → chunks.v1: fetch the content, parse it, split it.

It does not look at the manifests: between two steps another version may be under way, so only the step that writes can
say what a version changes. That keeps this step a function of the event alone. No version gives way to a newer one
here: that one may still be refused by the index, and then this is the newest.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

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
from streams.progress import ProgressLog
from streams.runner import Task
from streams.topology import StepName

_INLINE_BYTES = MAX_RECORD_BYTES // 2
"""Chunks beyond this go to the blob store; the rest of a plan, mostly metadata, is smaller than what is left."""

_MAX_PASSAGES = 8_000
"""One index change names what it added and removed, 29 bytes each. It fits a record even where it also removes what
two versions before it left half done."""

_CONTENTS_AT_ONCE = 8
"""Of one batch in memory: enough to fill the waits, and each may be as large as an upload."""

_QUICK_CHARS = 100_000
"""Text up to this length is split in some 30 ms at most; longer ones must not hold up other events."""

_NOTHING = ParsedDocument(text="", title=None, media_type="")
"""What a delete has to say."""


@dataclass(frozen=True, slots=True)
class Prepare:
    """The step.

    Attributes:
        profile: names parser, splitter and model; chunks of different profiles never mix.
        report: told when an event is chunked.
    """

    blobs: BlobStore
    parsers: ParserPool
    splitter: Splitter
    profile: str
    report: ProgressLog

    name = StepName.PREPARE

    async def run(self, tasks: Sequence[Task]) -> AsyncGenerator[Sequence[Outcome], None]:
        """See ``Step.run``."""
        async with aclosing(self._read(tasks)) as results:
            async for outcomes in results:
                yield outcomes

    async def close(self, task: Task, kind: str, reason: str) -> None:
        """See ``Step.close``: a try of this step leaves nothing that the next would not do as well."""

    def give_up(self, task: Task, reason: str) -> tuple[Record, ...]:
        """See ``Step.give_up``."""
        return (self._ended(task, EventOutcome.DEAD_LETTER, reason),)

    async def _read(self, tasks: Sequence[Task]) -> AsyncGenerator[list[Outcome], None]:
        """How tasks end, in their order: what follows begins while others are still read."""
        free = asyncio.Semaphore(_CONTENTS_AT_ONCE)
        reading = deque(asyncio.create_task(self._outcome(task, free), name="read-content") for task in tasks)
        try:
            while reading:
                await reading[0]
                ended: list[Outcome] = []
                while reading and reading[0].done():
                    ended.append(reading.popleft().result())
                yield ended
        finally:
            # Nothing of this try may go on beside the next one.
            for one in reading:
                one.cancel()
            await asyncio.gather(*reading, return_exceptions=True)

    async def _outcome(self, task: Task, free: asyncio.Semaphore) -> Outcome:
        event = cast("DocumentEvent", task.message)
        try:
            async with free:
                plan, chunks = await self.planned(event, self._position(task))
        except ParseFailed as failure:
            return self._dead(task, failure.kind, str(failure))
        except (BlobMissing, BlobCorrupt) as failure:
            return self._dead(task, "content-lost", str(failure))
        dumped = dump_chunks(chunks)
        if len(dumped) <= _INLINE_BYTES:
            plan = plan.model_copy(update={"chunks": tuple(chunks)})
        else:
            plan = plan.model_copy(update={"chunks_blob": await self.blobs.put(dumped)})
        self.report.reached(event, Stage.CHUNKED, plan.chunked_ms)
        return Finished((encode_plan(plan, task.partition, task.traceparent),))

    async def planned(self, event: DocumentEvent, position: str) -> tuple[ChunkPlan, list[PlannedChunk]]:
        """The plan of a document version, which refers to no chunks yet, and its chunks.

        Raises:
            ParseFailed, BlobMissing, BlobCorrupt: see there.
        """
        parsed, chunks, reason = await self._chunks(event)
        found = {
            "title": event.title or parsed.title,
            "content_metadata": _content_metadata(event, parsed),
            "reason": reason,
        }
        return self._plan(event, position).model_copy(update=found), chunks

    async def _chunks(self, event: DocumentEvent) -> tuple[ParsedDocument, list[PlannedChunk], str | None]:
        """What the event's content holds, and its chunks; without chunks, why there are none."""
        if event.change is Change.DELETED:
            return _NOTHING, [], None
        content = await self.blobs.get(cast("BlobRef", event.content))
        parsed = await self.parsers.parse(content, event.content_type, event.file_name)
        title = event.title or parsed.title
        if len(parsed.text) <= _QUICK_CHARS:
            chunks = self.splitter.split(parsed.text, title)
        else:
            chunks = await asyncio.to_thread(self.splitter.split, parsed.text, title)
        if len(chunks) > _MAX_PASSAGES:
            raise ParseFailed("too-large", f"it has {len(chunks)} passages, the limit is {_MAX_PASSAGES}: divide it")
        return parsed, chunks, None if chunks else why_empty(content, parsed.media_type)

    def _dead(self, task: Task, kind: str, reason: str) -> DeadLetter:
        return DeadLetter(kind, reason, self.give_up(task, reason))

    def _ended(self, task: Task, outcome: EventOutcome, reason: str) -> Record:
        event = cast("DocumentEvent", task.message)
        plan = self._plan(event, self._position(task)).model_copy(update={"outcome": outcome, "reason": reason})
        return encode_plan(plan, task.partition, task.traceparent)

    @staticmethod
    def _position(task: Task) -> str:
        return str(Position(task.partition, task.offset))

    def _plan(self, event: DocumentEvent, position: str) -> ChunkPlan:
        return ChunkPlan(
            event=event,
            position=position,
            profile=self.profile,
            chunked_ms=time.time() * 1000,
        )


def _content_metadata(event: DocumentEvent, parsed: ParsedDocument) -> dict[str, IndexedMetadataValue]:
    """What the content says of itself and its sender does not, as far as there is room beside what the sender says."""
    new = [(name, value) for name, value in parsed.metadata.items() if name not in event.metadata]
    return dict(new[: MAX_METADATA_ENTRIES - len(event.metadata)])
