"""How long after its 202 an edit is in the answers.

For each edit of a recorded history: ask a question that the new text answers (so that an answer without it is cached),
send the edit, and ask again with the position that the 202 gave. The clock runs from the 202 to the first answer that
holds the new text. Deletes likewise, to the first answer without the document.
"""

import asyncio
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from freshline.bench.installation import BenchmarkFailed, installed
from infra.embedding.onnx import load_tokenizer
from infra.local import Stack
from infra.settings import Settings
from ingest.connectors.event_file import RecordedEvent, read_events
from streams.core.splitting import Splitter

_TRIES: Final = 500
_FEWEST_WORDS: Final = 12
_MOST_WORDS: Final = 40
_TOP_K: Final = 20


@dataclass(frozen=True, slots=True)
class Edit:
    """A single edit of one document.

    Attributes:
        question: a line that this edit wrote.
        new: the passages that hold it.
    """

    event: RecordedEvent
    question: str
    new: frozenset[str]


async def bench_freshness(stack: Stack, events: Path, *, edits: int, overrides: Mapping[str, str]) -> dict[str, Any]:
    """Load the snapshot at the start of the history, then time its first single edits, then as many deletes.

    Raises:
        BenchmarkFailed: an answer never had the new text.
    """
    async with installed(stack, overrides) as installation, httpx.AsyncClient(timeout=30) as client:
        snapshot, planned = _plan(events, _splitter(installation.settings), edits)
        for event in snapshot:
            await _put(client, installation.ingest_url, event)
        await installation.caught_up(timeout_s=600)
        timed = [await _time_edit(client, installation.ingest_url, installation.query_url, edit) for edit in planned]
        doomed = list(dict.fromkeys(edit.event.doc_id for edit in planned))
        questions = {edit.event.doc_id: edit.question for edit in planned}
        gone = [
            await _time_delete(client, installation.ingest_url, installation.query_url, document_id, questions)
            for document_id in doomed
        ]
    stages = [stages for _, stages in timed]
    return {
        "documents": len(snapshot),
        "edits": len(timed),
        "freshness_ms": spread([elapsed for elapsed, _ in timed]),
        "deletes": len(gone),
        "deleted_ms": spread(gone),
        "stages_ms": {name: spread([one[name] for one in stages if name in one]) for name in stages[0]},
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median, 95th percentile and maximum."""
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    figures = {"min": ordered[0], "p50": statistics.median(ordered), "p95": p95, "max": ordered[-1]}
    return {name: round(figure, 1) for name, figure in figures.items()}


def _splitter(settings: Settings) -> Splitter:
    tokenizer = load_tokenizer(settings.embedding.models_path, settings.embedding.model)
    return Splitter(tokenizer.to_str(), settings.split.chunk_tokens, settings.split.overlap_tokens)


def _plan(events: Path, splitter: Splitter, edits: int) -> tuple[list[RecordedEvent], list[Edit]]:
    """The snapshot, and the first edits after it that write a line worth asking for."""
    snapshot: list[RecordedEvent] = []
    planned: list[Edit] = []
    lines: dict[str, set[str]] = {}
    for event in read_events(events):
        if event.content is None:
            continue
        known = lines.setdefault(event.doc_id, set())
        written = [line.strip() for line in event.content.splitlines()]
        if event.type == "created" and not planned:
            snapshot.append(event)
        elif event.type == "updated" and known:
            new = max((line for line in written if line not in known), key=lambda line: len(_words(line)), default="")
            passages = frozenset(chunk.text for chunk in splitter.split(event.content, None) if new in chunk.text)
            if len(_words(new)) >= _FEWEST_WORDS and passages:
                planned.append(Edit(event, " ".join(_words(new)[:_MOST_WORDS]), passages))
        known.update(written)
        if len(planned) == edits:
            return snapshot, planned
    raise BenchmarkFailed(f"{events.name} has only {len(planned)} edits that write a line, {edits} were asked for")


def _words(line: str) -> list[str]:
    """The prose of a line of Markdown: no link targets, template tags or addresses."""
    if not re.search(r"[a-z)]\.(\s|$)", line):  # no sentence ends here: front matter, a list of links
        return []
    return re.findall(r"[^\W\d_]{2,}", re.sub(r"\([^)]*\)|\{[^}]*\}|https?://\S+", " ", line))


async def _time_edit(
    client: httpx.AsyncClient, ingest_url: str, query_url: str, edit: Edit
) -> tuple[float, dict[str, float]]:
    await _ask(client, query_url, edit.question, None)
    accepted = await _put(client, ingest_url, edit.event)
    began_s = time.perf_counter()
    for _ in range(_TRIES):
        results = await _ask(client, query_url, edit.question, accepted["position"])
        elapsed_ms = (time.perf_counter() - began_s) * 1000
        if any(result["text"] in edit.new for result in results):
            return elapsed_ms, await _stages(client, ingest_url, accepted["event_id"])
    raise BenchmarkFailed(f"no answer to {edit.question!r} had the new text of {edit.event.path}")


async def _time_delete(
    client: httpx.AsyncClient, ingest_url: str, query_url: str, document_id: str, questions: Mapping[str, str]
) -> float:
    question = questions[document_id]
    before = await _ask(client, query_url, question, None)
    if all(result["document_id"] != document_id for result in before):
        raise BenchmarkFailed(f"{document_id} was not found before it was deleted")
    response = await client.delete(f"{ingest_url}/v1/documents/{document_id}")
    response.raise_for_status()
    began_s = time.perf_counter()
    for _ in range(_TRIES):
        results = await _ask(client, query_url, question, response.json()["position"])
        elapsed_ms = (time.perf_counter() - began_s) * 1000
        if all(result["document_id"] != document_id for result in results):
            return elapsed_ms
    raise BenchmarkFailed(f"{document_id} was still found after it was deleted")


async def _put(client: httpx.AsyncClient, ingest_url: str, event: RecordedEvent) -> dict[str, Any]:
    response = await client.put(
        f"{ingest_url}/v1/documents/{event.doc_id}",
        content=event.new_content(),
        headers={"content-type": "text/markdown"},
    )
    response.raise_for_status()
    return dict(response.json())


async def _ask(client: httpx.AsyncClient, query_url: str, question: str, position: str | None) -> list[dict[str, Any]]:
    body = {"query": question, "top_k": _TOP_K} | ({"min_position": position} if position else {})
    response = await client.post(f"{query_url}/v1/query", json=body)
    response.raise_for_status()
    return list(response.json()["results"])


async def _stages(client: httpx.AsyncClient, ingest_url: str, event_id: str) -> dict[str, float]:
    """Milliseconds from acceptance to each stage; the last one is recorded a moment after the answers have it."""
    for _ in range(_TRIES):
        status = (await client.get(f"{ingest_url}/v1/events/{event_id}")).raise_for_status().json()
        if status["outcome"] is not None:
            return {name: float(at_ms) for name, at_ms in status["stages_ms"].items()}
        await asyncio.sleep(0.01)
    raise BenchmarkFailed(f"event {event_id} never ended")
