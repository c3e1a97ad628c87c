"""The tour: real servers, real documents, an edit that changes an answer while one watches."""

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from freshline.bench.freshness import spread
from freshline.cli_questions import show_answer
from freshline.corpus import standard_library_pages
from freshline.installation import find, plan, remember
from freshline.services import ServiceFailed, Services, connect_services
from freshline.terminal import err, out, print_json
from infra.local import Stack, default_data_dir
from infra.local.progress import shown
from infra.opensearch.client import connect
from infra.settings import Settings
from ingest.connectors.client import Summary, connect_ingest, wait_until_applied
from ingest.connectors.event_file import ingest_event_file
from ingest.connectors.folder import ingest_folder
from ingest.connectors.git import ingest_git

_EDITS: Final = 10
_INGEST_TIMEOUT_S: Final = 1_800.0
_QUESTIONS: Final = (
    "How do I parse command line arguments?",
    "Which function compiles a regular expression?",
    "How can I run a function in a pool of processes?",
    "How do I read a zip archive?",
    "What computes a SHA-256 digest?",
)


@dataclass(frozen=True, slots=True)
class _Sources:
    """Documents that the user brought, one of these or none."""

    docs: Path | None
    git: Path | None
    events: Path | None

    @property
    def own(self) -> bool:
        """True if the user brought documents."""
        return any((self.docs, self.git, self.events))


def run_demo(
    *, docs: Path | None, git: Path | None, events: Path | None, once: bool, data_dir: Path | None, as_json: bool
) -> None:
    """Run the tour in a data directory of its own, so that it never touches another installation.

    Raises:
        StackError: a server does not start.
        ServiceFailed: an answer was not what the tour promises.
    """
    home = data_dir or default_data_dir().with_name("freshline-demo")
    config, installation = plan(home, nodes=1, ports={}, fresh=False)
    stack = Stack.open(config)
    sources = _Sources(docs, git, events)
    try:
        with shown() as say:
            stack.up(say=say)
        remember(config.data_dir, installation)
        settings = find(home)
        report = asyncio.run(_tour(settings, sources, home, quiet=as_json))
        if as_json:
            print_json(report)
        if once:
            return
        _say_addresses(settings, home)
        stack.wait()
    except KeyboardInterrupt:
        err.print("stopping …")
    finally:
        stack.down()


async def _tour(settings: Settings, sources: _Sources, home: Path, *, quiet: bool) -> dict[str, Any]:
    show = err if quiet else out
    began_s = time.perf_counter()
    summary = await _ingest(settings, sources, home)
    ingest_s = time.perf_counter() - began_s
    chunks = await _count(settings, settings.names.chunks_alias)
    documents = summary.sent + summary.skipped
    show.print(f"\n{documents} documents, {chunks} passages searchable ({ingest_s:.1f} s)", style="bold")
    async with connect_services(settings) as services:
        asked = await _ask(services, sources, quiet=quiet)
        stages, freshness_ms, deleted_ms = await _change(services, quiet=quiet)
    return {
        "documents": documents,
        "chunks": chunks,
        "ingest_s": round(ingest_s, 1),
        "questions": asked,
        "freshness_ms": freshness_ms,
        "deleted_ms": deleted_ms,
        "stages_ms": stages,
    }


async def _ingest(settings: Settings, sources: _Sources, home: Path) -> Summary:
    key = settings.tenant.api_key.get_secret_value() if settings.tenant.api_key else None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err) as bar:
        task = bar.add_task("documents", total=None)

        def told(summary: Summary) -> None:
            bar.update(task, completed=summary.sent + summary.skipped + summary.deleted)

        async with connect_ingest(f"http://{settings.ingest.host}:{settings.ingest.port}", key) as client:
            if sources.git is not None:
                summary = await ingest_git(client, sources.git, progress=told)
            elif sources.events is not None:
                summary = await ingest_event_file(client, sources.events, progress=told)
            else:
                pages = sources.docs
                if pages is None:
                    pages = await asyncio.to_thread(standard_library_pages, home / "corpus")
                summary = await ingest_folder(client, pages, progress=told)
            bar.update(task, description="embedding and indexing")
            if summary.last_events:
                await wait_until_applied(client, summary, timeout_s=_INGEST_TIMEOUT_S)
            bar.update(task, description="documents", total=bar.tasks[task].completed)
            return summary


async def _ask(services: Services, sources: _Sources, *, quiet: bool) -> list[dict[str, Any]]:
    questions = await _own_questions(services) if sources.own else _QUESTIONS
    asked = []
    for question in questions:
        answer = await services.ask(question, generate=True, top_k=3)
        again = await services.ask(question, generate=True, top_k=3)
        if not quiet:
            out.print(f"\n? {question}", style="bold green", markup=False)
            show_answer(answer)
            out.print(f"asked again: {again['query_time_ms']:.2f} ms, cached", style="dim")
        asked.append(
            {
                "question": question,
                "sources": [result["document_id"] for result in answer["results"]],
                "query_ms": answer["query_time_ms"],
                "cached_query_ms": again["query_time_ms"],
            }
        )
    return asked


async def _own_questions(services: Services) -> Sequence[str]:
    """For documents nobody knows beforehand: their own headings."""
    found = (await services.ask("overview introduction how to", top_k=20))["results"]
    headings = [result["heading_path"][-1] if result["heading_path"] else result["title"] for result in found]
    return list(dict.fromkeys(heading for heading in headings if heading))[:3]


async def _change(services: Services, *, quiet: bool) -> tuple[dict[str, Any], dict[str, float], float]:
    """Edit one document several times, then delete it; each time until the answers have it."""
    show = err if quiet else out
    document = "freshline-demo/notice.md"
    notice = "# Notice board\n\nThe notice board tells the code words of the tour.\n"
    first = await services.put(document, notice.encode(), "text/markdown")
    await services.ended(first["event_id"])
    elapsed_ms: list[float] = []
    stages: list[Mapping[str, float]] = []
    for number in range(1, _EDITS + 1):
        word = secrets.token_hex(4)
        notice += f"\n## Code word {number}\n\nThe code word of notice number {number} is {word}.\n"
        question = f"What is the code word of notice number {number}?"
        await services.ask(question, generate=True)  # now an answer without it is cached
        accepted = await services.put(document, notice.encode(), "text/markdown")
        began_s = time.perf_counter()
        answer = await services.ask(question, generate=True, min_position=accepted["position"])
        elapsed_ms.append((time.perf_counter() - began_s) * 1000)
        if not any(word in result["text"] for result in answer["results"]):
            raise ServiceFailed(f"the answer to {question!r} does not have the edit at {accepted['position']}")
        status = await services.ended(accepted["event_id"])
        stages.append(status["stages_ms"])
        if number == 1:
            show.print(f"\nedited {document}; the answer to “{question}” is now:", style="bold green")
            show.print(str(answer["answer"]), markup=False)
    freshness_ms = spread(elapsed_ms)
    show.print(f"{_EDITS} edits, from 202 to the answer that has it: {_said(freshness_ms)}", style="bold")
    by_stage = {name: spread([one[name] for one in stages]) for name in stages[0]}
    for name, figures in by_stage.items():
        show.print(f"  {name:12} {figures['p50']:7.1f} ms after acceptance (median)", style="dim")
    question = "What is the code word of notice number 1?"
    accepted = await services.delete(document)
    began_s = time.perf_counter()
    answer = await services.ask(question, generate=True, min_position=accepted["position"])
    deleted_ms = round((time.perf_counter() - began_s) * 1000, 1)
    if any(result["document_id"] == document for result in answer["results"]):
        raise ServiceFailed(f"{document} is still found at {accepted['position']}, where it was deleted")
    show.print(f"deleted {document}: gone from the answers after {deleted_ms} ms", style="bold")
    return by_stage, freshness_ms, deleted_ms


def _say_addresses(settings: Settings, home: Path) -> None:
    key = settings.tenant.api_key
    err.print("\nServing until Ctrl-C:", style="bold")
    err.print(f"  page and query API   http://{settings.query.host}:{settings.query.port}/", markup=False)
    err.print(f"  ingest API           http://{settings.ingest.host}:{settings.ingest.port}/docs", markup=False)
    if key:
        err.print(f"  key                  {key.get_secret_value()}", markup=False)
    err.print(f'  in another terminal  FRESHLINE_HOME={home} freshline ask "…"', markup=False)


async def _count(settings: Settings, index: str) -> int:
    client = connect(settings.opensearch)
    try:
        return int((await client.count(index=index))["count"])
    finally:
        await client.close()


def _said(figures: Mapping[str, float]) -> str:
    return f"median {figures['p50']} ms, 95th percentile {figures['p95']} ms, longest {figures['max']} ms"
