"""Throughput of a complete history through the pipeline, relative to the embedder alone in the same run.

The rate counts embedded texts over the time from the first request until the last event is searchable. Parsing, Kafka,
OpenSearch and Redis on the same cores are the difference to the embedder alone, which embeds one half of the same texts
before and the other half after the run, so that machine drift favours neither.

Newly started servers compile their code while they work. Unless a cold start is to be measured, the history first
passes through an installation that is discarded.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.installation import BenchInstallation, installed
from freshline.services import ingest_client
from freshline.verify.run import verify
from infra.embedding.factory import open_embedder, open_tokenizer
from infra.kafka.codec import decode
from infra.kafka.topic_reader import read_to_end
from infra.local import Stack
from infra.opensearch.index import OpenSearchIndex
from infra.settings import Settings
from ingest.connectors.client import Summary
from ingest.connectors.event_file import ingest_event_file, read_events
from schemas.documents import LifeState, Outcome
from schemas.events import IndexChange
from schemas.topics import INDEX_CHANGES
from streams.core.splitting import Splitter, embedding_text
from streams.parsing.sandbox import ParserPool

_TIMEOUT_S: Final = 1_800.0


@dataclass(frozen=True, slots=True)
class _History:
    """The result of processing the recorded events sequentially.

    Attributes:
        snapshot: number of events before the first that is no creation.
        chunk_counts: (document id, revision) → passages of that version.
        texts: distinct embedded text → first revision that needs it.
        live: ids of the documents at the end.
    """

    snapshot: int
    chunk_counts: Mapping[tuple[str, int], int]
    texts: Mapping[str, int]
    live: frozenset[str]

    @property
    def snapshot_texts(self) -> int:
        """Distinct texts of the snapshot."""
        return sum(revision <= self.snapshot for revision in self.texts.values())


async def bench_ingest(
    stack: Stack, events: Path, *, overrides: Mapping[str, str], cold: bool, say: Callable[[str, str], None]
) -> dict[str, Any]:
    """Process the history and verify the result.

    Args:
        stack: a running stack.
        events: the history.
        overrides: settings that override those of the stack.
        cold: measure without warm-up.
        say: reports progress.

    Raises:
        BenchmarkFailed: the pipeline did not finish.
    """
    if not cold:
        say("warm-up", "processing the history")
        async with installed(stack, overrides) as installation:
            await _run(installation, events)
    say("measurement", "processing the history, and the embedder alone")
    async with installed(stack, overrides) as installation:
        settings = installation.settings
        history = await _replay(events, settings)
        texts = list(history.texts)
        half = len(texts) // 2
        alone_s = await _embed_alone(settings, texts[:half])
        used_s = installation.cpu_s()
        began_ms = time.time() * 1_000
        summary, sent_s, committed_s = await _run(installation, events)
        used_s = {name: round(now_s - used_s[name], 1) for name, now_s in installation.cpu_s().items()}
        alone_s += await _embed_alone(settings, texts[half:])
        say("verification", "comparing index, manifests, contents and stream")
        embedded = await installation.embedded_count()
        changes = await _changes(settings)
        report = await verify(settings, repair=False)
        live = await _live(settings)
    pipeline_s = max((one.times.searchable_ms or began_ms) - began_ms for one in changes) / 1_000
    pipeline_per_s, alone_per_s = embedded / pipeline_s, len(texts) / alone_s
    return {
        "warmed_up": not cold,
        "events": summary.sent + summary.deleted,
        "not_sent": len(summary.failed),
        "accepted_in_s": round(sent_s, 1),
        "searchable_in_s": round(pipeline_s, 1),
        "committed_in_s": round(committed_s, 1),
        "cpu_s": used_s,
        "chunks_embedded": embedded,
        "chunks_per_s": round(pipeline_per_s, 1),
        "embedder_alone_chunks_per_s": round(alone_per_s, 1),
        "ratio_to_embedder": round(pipeline_per_s / alone_per_s, 3),
        **_edit_figures(history, changes, embedded),
        "outcomes": {str(outcome): sum(change.outcome is outcome for change in changes) for outcome in Outcome},
        "verify_ok": report.ok,
        "live_documents": len(live),
        "live_set_equals_replay": live == history.live,
    }


async def _run(installation: BenchInstallation, events: Path) -> tuple[Summary, float, float]:
    """Send the history. Returns the summary, seconds until all was accepted, and until every step had committed all."""
    settings = installation.settings
    began_s = time.perf_counter()
    async with ingest_client(settings) as client:
        summary = await ingest_event_file(client, events, log_path=settings.blobs.path.parent / "sent.log")
    sent_s = time.perf_counter() - began_s
    await installation.caught_up(timeout_s=_TIMEOUT_S)
    return summary, sent_s, time.perf_counter() - began_s


def _edit_figures(history: _History, changes: Sequence[IndexChange], embedded: int) -> dict[str, Any]:
    """Embedding cost of the edits, relative to embedding all passages of every version.

    Edits that arrive faster than they are embedded supersede each other. So there are three ratios: to all versions
    sent, to the processed versions, and the ratio if every version had been processed on its own.
    """
    edits = [one for one in changes if one.outcome is Outcome.DONE and one.version > history.snapshot]
    full = sum(history.chunk_counts.get((change.document_id, change.version), 0) for change in edits)
    on_edits = embedded - history.snapshot_texts
    every_version = sum(count for (_, revision), count in history.chunk_counts.items() if revision > history.snapshot)
    needed = len(history.texts) - history.snapshot_texts
    return {
        "edits_processed": len(edits),
        "chunks_of_all_edited_versions": every_version,
        "chunks_of_processed_versions": full,
        "embedded_on_edits": on_edits,
        "embedded_share_on_edits": round(on_edits / every_version, 3),
        "embedded_share_of_processed": round(on_edits / full, 3),
        "embedded_share_one_by_one": round(needed / every_version, 3),
    }


async def _replay(events: Path, settings: Settings) -> _History:
    tokenizer = open_tokenizer(settings.embedding)
    splitter = Splitter(tokenizer, settings.split.chunk_tokens, settings.split.overlap_tokens)
    snapshot: int | None = None
    counts: dict[tuple[str, int], int] = {}
    texts: dict[str, int] = {}
    contents: dict[str, bytes] = {}
    parsers = ParserPool(settings.parse)
    await parsers.start()
    try:
        for event in read_events(events):
            revision = event.seq + 1
            if snapshot is None and event.type != "created":
                snapshot = event.seq
            if event.type == "deleted":
                contents.pop(event.doc_id, None)
                continue
            content = event.new_content()
            contents[event.doc_id] = contents[event.doc_id] if content is None else content
            parsed = await parsers.parse(contents[event.doc_id], "text/markdown", event.path)
            chunks = splitter.split(parsed.text, parsed.title)
            counts[event.doc_id, revision] = len(chunks)
            for chunk in chunks:
                texts.setdefault(embedding_text(parsed.title, chunk), revision)
    finally:
        await parsers.close()
    return _History(snapshot or 0, counts, texts, frozenset(contents))


async def _embed_alone(settings: Settings, texts: Sequence[str]) -> float:
    """Seconds to embed the texts in one call, without other work."""
    embedder = open_embedder(settings.embedding)
    try:
        await embedder.embed_passages(texts[:16])
        began_s = time.perf_counter()
        await embedder.embed_passages(texts)
        return time.perf_counter() - began_s
    finally:
        await embedder.close()


async def _changes(settings: Settings) -> list[IndexChange]:
    """Last outcome of each event."""
    changes: dict[str, IndexChange] = {}
    async for record in read_to_end(settings, INDEX_CHANGES):
        change = decode(IndexChange, record.value, record.headers)
        changes[change.position] = change
    return list(changes.values())


async def _live(settings: Settings) -> frozenset[str]:
    """Ids of the documents in the index."""
    index = OpenSearchIndex.open(settings)
    try:
        return frozenset([one.document_id async for one in index.scan_manifests() if one.state is LifeState.LIVE])
    finally:
        await index.close()
