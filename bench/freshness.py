"""How long after its 202 an edit is in the answers.

For each edit of a recorded history: ask a question that the new text answers (so that an answer without it is cached),
send the edit, and ask again with the position that the 202 gave. The clock runs from the 202 to the first answer that
holds the new text. Deletes likewise, to the first answer without the document.

After each edit a program without a stream makes the same edit in an index of its own, and is timed likewise: what the
same passages cost with the same model, index and machine.
"""

import re
import statistics
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.installation import BenchmarkFailed, installed
from bench.script import Script
from freshline.figures import spread
from freshline.services import Services, connect_services
from infra.embedding.factory import open_tokenizer
from infra.local import Stack
from infra.settings import Settings
from ingest.connectors.event_file import RecordedEvent, read_events
from streams.core.splitting import Splitter
from streams.parsing.parse import parse

_TRIES: Final = 500
_FEWEST_WORDS: Final = 12
_MOST_WORDS: Final = 40
_TOP_K: Final = 20


@dataclass(frozen=True, slots=True)
class Edit:
    """A single edit of one document.

    Attributes:
        question: a line that this edit wrote.
        line: the same as it stands in the document; one passage holds all of it.
    """

    event: RecordedEvent
    question: str
    line: str


async def bench_freshness(stack: Stack, events: Path, *, edits: int, overrides: Mapping[str, str]) -> dict[str, Any]:
    """Load the snapshot at the start of the history, then time its first single edits and deletes of their documents.

    Edits of the history that cannot be asked for are sent too, untimed, so that each timed one is as large as it was.

    Raises:
        BenchmarkFailed: an answer never had the new text.
    """
    async with installed(stack, overrides) as installation, AsyncExitStack() as ending:
        splitter = _splitter(installation.settings)
        snapshot, planned = _plan(events, splitter, edits)
        services = await ending.enter_async_context(connect_services(installation.settings))
        script = await ending.enter_async_context(Script.opened(installation.settings, splitter))
        for event in snapshot:
            await _put(services, event)
        await installation.caught_up(timeout_s=600)
        for event in snapshot:
            await script.put(event.doc_id, _content(event))
        timed: list[tuple[float, dict[str, float]]] = []
        by_script: list[float] = []
        questions: dict[str, str] = {}
        for event, edit in planned:
            if edit is None:
                accepted = await _put(services, event)
                await services.ended(accepted["event_id"])
                await script.put(event.doc_id, _content(event))
            else:
                timed.append(await _time_edit(services, edit))
                by_script.append(await _time_script(script, edit))
                questions[event.doc_id] = edit.question
        gone = [await _time_delete(services, document_id, question) for document_id, question in questions.items()]
    stages = [stages for _, stages in timed]
    pairs = [(ours, bare) for (ours, _), bare in zip(timed, by_script, strict=True)]
    return {
        "documents": len(snapshot),
        "edits": len(timed),
        "freshness_ms": spread([ours for ours, _ in pairs]),
        "script_ms": spread(by_script),
        "more_than_script_ms": spread([ours - bare for ours, bare in pairs]),
        "ratio_to_script": round(statistics.median(ours / bare for ours, bare in pairs), 3),
        "deletes": len(gone),
        "deleted_ms": spread(gone),
        "stages_ms": {name: spread([one[name] for one in stages if name in one]) for name in stages[0]},
    }


def _splitter(settings: Settings) -> Splitter:
    tokenizer = open_tokenizer(settings.embedding)
    return Splitter(tokenizer, settings.split.chunk_tokens, settings.split.overlap_tokens)


def _plan(
    events: Path, splitter: Splitter, edits: int
) -> tuple[list[RecordedEvent], list[tuple[RecordedEvent, Edit | None]]]:
    """The snapshot, and what follows it until enough edits wrote a sentence worth asking for."""
    snapshot: list[RecordedEvent] = []
    planned: list[tuple[RecordedEvent, Edit | None]] = []
    lines: dict[str, set[str]] = {}
    for event in read_events(events):
        if event.content is None:
            continue
        known = lines.setdefault(event.doc_id, set())
        written = [line.strip() for line in event.content.splitlines()]
        if event.type == "created" and not planned:
            snapshot.append(event)
        else:
            new = max((line for line in written if line not in known), key=lambda line: len(_words(line)), default="")
            parsed = parse(event.content.encode(), "text/markdown")
            whole = any(new in chunk.text for chunk in splitter.split(parsed.text, parsed.title))
            askable = known and whole and len(_words(new)) >= _FEWEST_WORDS
            planned.append((event, Edit(event, " ".join(_words(new)[:_MOST_WORDS]), new) if askable else None))
        known.update(written)
        if sum(edit is not None for _, edit in planned) == edits:
            return snapshot, planned
    raise BenchmarkFailed(f"{events.name} has fewer than {edits} edits that write a sentence")


def _words(line: str) -> list[str]:
    """The prose of a line of Markdown: no link targets, template tags or addresses."""
    if not re.search(r"[a-z)]\.(\s|$)", line):  # no sentence ends here: front matter, a list of links
        return []
    return re.findall(r"[^\W\d_]{2,}", re.sub(r"\([^)]*\)|\{[^}]*\}|https?://\S+", " ", line))


async def _ask(services: Services, question: str, **parameters: str) -> list[dict[str, Any]]:
    answer = await services.ask(question, top_k=_TOP_K, **parameters)
    return list(answer["results"])


async def _put(services: Services, event: RecordedEvent) -> dict[str, Any]:
    return await services.put(event.doc_id, _content(event), "text/markdown")


def _content(event: RecordedEvent) -> bytes:
    return event.new_content() or b""


async def _time_script(script: Script, edit: Edit) -> float:
    began_s = time.perf_counter()
    await script.put(edit.event.doc_id, _content(edit.event))
    if not await script.finds(edit.question, edit.line, top_k=_TOP_K):
        raise BenchmarkFailed(f"the script found nothing of the new text of {edit.event.path}")
    return (time.perf_counter() - began_s) * 1000


async def _time_edit(services: Services, edit: Edit) -> tuple[float, dict[str, float]]:
    await _ask(services, edit.question)
    accepted = await _put(services, edit.event)
    began_s = time.perf_counter()
    for _ in range(_TRIES):
        results = await _ask(services, edit.question, min_position=accepted["position"])
        elapsed_ms = (time.perf_counter() - began_s) * 1000
        if any(edit.line in result["text"] for result in results):
            return elapsed_ms, (await services.ended(accepted["event_id"]))["stages_ms"]
    raise BenchmarkFailed(f"no answer to {edit.question!r} had the new text of {edit.event.path}")


async def _time_delete(services: Services, document_id: str, question: str) -> float:
    before = await _ask(services, question)
    if all(result["document_id"] != document_id for result in before):
        raise BenchmarkFailed(f"{document_id} was not found before it was deleted")
    accepted = await services.delete(document_id)
    began_s = time.perf_counter()
    for _ in range(_TRIES):
        results = await _ask(services, question, min_position=accepted["position"])
        elapsed_ms = (time.perf_counter() - began_s) * 1000
        if all(result["document_id"] != document_id for result in results):
            return elapsed_ms
    raise BenchmarkFailed(f"{document_id} was still found after it was deleted")
