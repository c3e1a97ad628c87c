"""Time from the 202 response of an edit to the first answer that contains it.

For each edit of a recorded history: ask a question whose answer the edit changes, so that the old answer is cached;
    send
the edit; ask again with the position of the 202. The time is measured from the 202 to the first answer with the new
text; for deletes, to the first answer without the document.

After each edit, a single process without a stream performs the same edit in its own index, with the same passages,
model and machine.
"""

import re
import statistics
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypedDict

from bench.installation import BenchmarkFailed, installed
from bench.single_process import SingleProcessPipeline
from freshline.figures import spread
from freshline.installation import settings_from
from freshline.services import Services, connect_services
from infra.embedding.factory import open_tokenizer
from infra.local import Stack
from infra.settings import Settings
from ingest.connectors.event_file import RecordedEvent, read_events
from streams.core.splitting import Splitter
from streams.parsing.parse import parse

_ATTEMPTS: Final = 500
_MIN_WORDS: Final = 12
_MAX_WORDS: Final = 40
_TOP_K: Final = 20


@dataclass(frozen=True, slots=True)
class Edit:
    """An edit of a document.

    Attributes:
        question: words of a line that the edit wrote.
        line: this line, contained in one passage.
    """

    event: RecordedEvent
    question: str
    line: str


class FreshnessResults(TypedDict):
    """Results of the benchmark. Times are milliseconds, as spread over the edits or deletes.

    Attributes:
        documents: documents of the snapshot.
        edits: measured edits.
        freshness_ms: from upload to an answer with the new text.
        single_process_ms: the same in a single process without streams.
        stream_overhead_ms: difference of both.
        ratio_to_single_process: median of their ratios.
        deletes: measured deletes.
        deleted_ms: from delete to an answer without the document.
        stages_ms: stage → from upload to the stage.
    """

    documents: int
    edits: int
    freshness_ms: dict[str, float]
    single_process_ms: dict[str, float]
    stream_overhead_ms: dict[str, float]
    ratio_to_single_process: float
    deletes: int
    deleted_ms: dict[str, float]
    stages_ms: dict[str, dict[str, float]]


async def bench_freshness(stack: Stack, events: Path, *, edits: int, overrides: Mapping[str, str]) -> FreshnessResults:
    """Load the snapshot of a history, then measure its first suitable edits and the deletes of their documents.

    Unsuitable edits are sent without being measured, so that each measured edit has its original size.

    Raises:
        BenchmarkFailed: the history has too few edits, or no answer contained the new text.
    """
    splitter = _splitter(settings_from(stack.environment() | {**overrides}))
    snapshot, planned = _plan(events, splitter, edits)
    async with installed(stack, overrides) as installation, AsyncExitStack() as ending:
        services = await ending.enter_async_context(connect_services(installation.settings))
        single_process = await ending.enter_async_context(SingleProcessPipeline.opened(installation.settings, splitter))
        for event in snapshot:
            await _put(services, event)
        await installation.caught_up(timeout_s=600)
        for event in snapshot:
            await single_process.put(event.doc_id, _content(event))
        measured: list[tuple[float, dict[str, float]]] = []
        single_process_times_ms: list[float] = []
        questions: dict[str, str] = {}
        for event, edit in planned:
            if edit is None:
                accepted = await _put(services, event)
                await services.ended(accepted["event_id"])
                await single_process.put(event.doc_id, _content(event))
            else:
                measured.append(await _time_edit(services, edit))
                single_process_times_ms.append(await _time_single_process(single_process, edit))
                questions[event.doc_id] = edit.question
        deletes_ms = [
            await _time_delete(services, document_id, question) for document_id, question in questions.items()
        ]
    stages = [stages for _, stages in measured]
    pairs = [(ours, bare) for (ours, _), bare in zip(measured, single_process_times_ms, strict=True)]
    return {
        "documents": len(snapshot),
        "edits": len(measured),
        "freshness_ms": spread([ours for ours, _ in pairs]),
        "single_process_ms": spread(single_process_times_ms),
        "stream_overhead_ms": spread([ours - bare for ours, bare in pairs]),
        "ratio_to_single_process": round(statistics.median(ours / bare for ours, bare in pairs), 3),
        "deletes": len(deletes_ms),
        "deleted_ms": spread(deletes_ms),
        "stages_ms": {name: spread([one[name] for one in stages if name in one]) for name in stages[0]},
    }


def _splitter(settings: Settings) -> Splitter:
    tokenizer = open_tokenizer(settings.embedding)
    return Splitter(tokenizer, settings.split.chunk_tokens, settings.split.overlap_tokens)


def _plan(
    events: Path, splitter: Splitter, edits: int
) -> tuple[list[RecordedEvent], list[tuple[RecordedEvent, Edit | None]]]:
    """The snapshot, and the events after it until enough edits write a sentence to ask for."""
    snapshot: list[RecordedEvent] = []
    planned: list[tuple[RecordedEvent, Edit | None]] = []
    lines: dict[str, set[str]] = {}
    for event in read_events(events):
        if event.content is None:
            continue
        earlier_lines = lines.setdefault(event.doc_id, set())
        written = [line.strip() for line in event.content.splitlines()]
        if event.type == "created" and not planned:
            snapshot.append(event)
        else:
            new = max(
                (line for line in written if line not in earlier_lines), key=lambda line: len(_words(line)), default=""
            )
            parsed = parse(event.content.encode(), "text/markdown")
            whole = any(new in chunk.text for chunk in splitter.split(parsed.text, parsed.title))
            suitable = earlier_lines and whole and len(_words(new)) >= _MIN_WORDS
            planned.append((event, Edit(event, " ".join(_words(new)[:_MAX_WORDS]), new) if suitable else None))
        earlier_lines.update(written)
        if sum(edit is not None for _, edit in planned) == edits:
            return snapshot, planned
    raise BenchmarkFailed(f"{events.name} has fewer than {edits} edits that write a sentence")


def _words(line: str) -> list[str]:
    """Prose of a line of Markdown, without link targets, template tags and addresses."""
    if not re.search(r"[a-z)]\.(\s|$)", line):  # no sentence: front matter or a list of links
        return []
    return re.findall(r"[^\W\d_]{2,}", re.sub(r"\([^)]*\)|\{[^}]*\}|https?://\S+", " ", line))


async def _ask(services: Services, question: str, **parameters: str) -> list[dict[str, Any]]:
    answer = await services.ask(question, top_k=_TOP_K, **parameters)
    return list(answer["results"])


async def _put(services: Services, event: RecordedEvent) -> dict[str, Any]:
    return await services.put(event.doc_id, _content(event), "text/markdown")


def _content(event: RecordedEvent) -> bytes:
    return event.new_content() or b""


async def _time_single_process(single_process: SingleProcessPipeline, edit: Edit) -> float:
    began_s = time.perf_counter()
    await single_process.put(edit.event.doc_id, _content(edit.event))
    if not await single_process.finds(edit.question, edit.line, top_k=_TOP_K):
        raise BenchmarkFailed(f"the single process did not find the new text of {edit.event.path}")
    return (time.perf_counter() - began_s) * 1000


async def _time_edit(services: Services, edit: Edit) -> tuple[float, dict[str, float]]:
    await _ask(services, edit.question)
    accepted = await _put(services, edit.event)
    began_s = time.perf_counter()
    for _ in range(_ATTEMPTS):
        results = await _ask(services, edit.question, min_position=accepted["position"])
        elapsed_ms = (time.perf_counter() - began_s) * 1000
        if any(edit.line in result["text"] for result in results):
            return elapsed_ms, (await services.ended(accepted["event_id"]))["stages_ms"]
    raise BenchmarkFailed(f"no answer to {edit.question!r} contained the new text of {edit.event.path}")


async def _time_delete(services: Services, document_id: str, question: str) -> float:
    before = await _ask(services, question)
    if all(result["document_id"] != document_id for result in before):
        raise BenchmarkFailed(f"{document_id} was not found before it was deleted")
    accepted = await services.delete(document_id)
    began_s = time.perf_counter()
    for _ in range(_ATTEMPTS):
        results = await _ask(services, question, min_position=accepted["position"])
        elapsed_ms = (time.perf_counter() - began_s) * 1000
        if all(result["document_id"] != document_id for result in results):
            return elapsed_ms
    raise BenchmarkFailed(f"{document_id} was still found after it was deleted")
