"""The demo: ingest real documents on real servers, ask, edit and delete, and show the effect on answers."""

import asyncio
import fcntl
import secrets
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from freshline.cli.documents import Source, send_and_wait
from freshline.cli.questions import show_answer
from freshline.cli.stack import supervise
from freshline.cli.terminal import err, out, print_json
from freshline.demo.corpus import Sources, Text, editable, standard_library_pages
from freshline.figures import spread
from freshline.installation import await_workers, find, plan, save
from freshline.services import ServiceFailed, Services, connect_services, console_url
from infra.local import Phase, Stack, StackError, default_data_dir
from infra.local.progress import shown
from infra.opensearch.client import connect
from infra.settings import Settings

_EDITS: Final = 10
_TOP_K: Final = 3
_OWN_QUESTIONS: Final = 3
_INGEST_TIMEOUT_S: Final = 1_800.0
_LOCK: Final = "demo.lock"
_NAMESPACE: Final = "freshline-demo"
_DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
_QUESTIONS: Final = (
    "How do I generate cryptographically strong random numbers?",
    "What is the difference between shallow and deep copying?",
    "How do I compute the greatest common divisor?",
    "Which function compiles a regular expression?",
    "How do I compare two directories?",
)


@dataclass(frozen=True, slots=True)
class _Edited:
    """An edit.

    Attributes:
        fact: its content, unique among the edits.
        freshness_ms: from the 202 to the answer with the edit.
        stages_ms: from acceptance to each stage of the pipeline.
        answer: the first answer at its position.
    """

    fact: str
    freshness_ms: float
    stages_ms: Mapping[str, float]
    answer: dict[str, Any]


def run_demo(
    sources: Sources, *, questions: Sequence[str] = (), once: bool, data_dir: Path | None, as_json: bool
) -> None:
    """Run the demo in a dedicated data directory, which is emptied first, so that other installations are unaffected.

    Args:
        sources: documents to use instead of the standard library documentation.
        questions: questions to ask instead of the built-in ones.
        once: exit afterwards; otherwise serve until Ctrl-C.
        data_dir: data directory; default: next to the user's.
        as_json: print a report on standard output, and everything else on standard error.

    Raises:
        StackError: a server did not start, or the directory has other content.
        ServiceFailed: an answer was not as expected.
    """
    default = default_data_dir()
    home = data_dir or default.with_name(f"{default.name}-demo")
    with _alone(home):
        config, installation = plan(home, overrides={"FRESHLINE_NAMESPACE": _NAMESPACE})
        stack = Stack.open(config)
        stack.down()  # processes of a killed demo
        save(home, installation)
        try:
            with shown() as say:
                pages = None if sources.own else _pages(say)
                stack.up(fresh=True, say=say)
                settings = find(home)
                say("workers", "joining")
                asyncio.run(await_workers(settings, stack))
                say("workers", Phase.READY)
            demo = _Demo(settings, sources, pages, home, console=err if as_json else out)
            report = asyncio.run(demo.run(questions))
            if as_json:
                print_json(report)
            if once:
                return
            _print_addresses(settings, home)
            ended = supervise(stack)
            if ended.state is not Phase.STOPPED:
                raise StackError(ended.error or f"the demo ended as {ended.state}")
        except KeyboardInterrupt:
            err.print("stopping …")
            raise
        finally:
            stack.down()


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Lock the directory against a second demo. The lock is released with this process in any case.

    Raises:
        StackError: a demo is running there, or the directory has other content.
    """
    lock = home / _LOCK
    if home.is_dir() and any(home.iterdir()) and not lock.exists():
        raise StackError(
            f"{home} has other content, and the demo needs an empty directory: choose another one with --data"
        )
    home.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(
                f"a demo is running in {home}: stop it with Ctrl-C, or choose another one with --data"
            ) from None
        yield


def _pages(say: Any) -> Path:
    say("documents", "rendering the standard library documentation")
    pages = standard_library_pages()
    say("documents", Phase.READY)
    return pages


class _Demo:
    """The steps of the demo, in order."""

    def __init__(
        self, settings: Settings, sources: Sources, pages: Path | None, home: Path, *, console: Console
    ) -> None:
        self._settings = settings
        self._sources = sources
        self._pages = pages
        self._home = home
        self._show = console

    async def run(self, questions: Sequence[str]) -> dict[str, Any]:
        """Run all steps. Returns the report."""
        began_s = time.perf_counter()
        documents = await self._ingest()
        ingest_s = time.perf_counter() - began_s
        chunks = await self._chunks()
        self._show.print(f"\n{documents} documents, {chunks} passages searchable ({ingest_s:.1f} s)", style="bold")
        async with connect_services(self._settings) as services:
            asked = await self._ask(services, questions or await self._questions(services))
            document = await asyncio.to_thread(editable, self._sources, self._pages)
            edits = await self._edit(services, document)
            deleted_ms = await self._delete(services, document)
        return {
            "documents": documents,
            "chunks": chunks,
            "ingest_s": round(ingest_s, 1),
            "questions": len(asked),
            "answers": asked,
            "edits": len(edits),
            "freshness_ms": spread([edit.freshness_ms for edit in edits]),
            "deleted_ms": deleted_ms,
            "stages_ms": _medians([edit.stages_ms for edit in edits]),
        }

    async def _ingest(self) -> int:
        log_path = self._home / "sent.jsonl"
        log_path.unlink(missing_ok=True)
        own = self._sources
        source = Source(own.docs or self._pages, own.git, own.events, log_path=log_path)
        report = await send_and_wait(self._settings, source, _INGEST_TIMEOUT_S)
        report.show_findings()
        if report.error is not None:
            raise report.error
        if report.in_progress:
            raise ServiceFailed(f"{len(report.in_progress)} events have not ended within {_INGEST_TIMEOUT_S:g} s")
        return await self._documents()

    async def _questions(self, services: Services) -> Sequence[str]:
        """For the user's own documents: their headings, preferably those with an answer."""
        if not self._sources.own:
            return _QUESTIONS
        found = (await services.ask("overview introduction how to", top_k=20))["results"]
        headings = [result["heading_path"][-1] if result["heading_path"] else result["title"] for result in found]
        candidates = list(dict.fromkeys(heading for heading in headings if heading))
        answered: list[str] = []
        for heading in candidates:
            # With a different top_k, so that the answers of the demo itself are not cached.
            answer = await services.ask(heading, generate=True, top_k=_TOP_K + 1)
            if answer["citations"]:
                answered.append(heading)
            if len(answered) == _OWN_QUESTIONS:
                break
        return (answered or candidates)[:_OWN_QUESTIONS]

    async def _ask(self, services: Services, questions: Sequence[str]) -> list[dict[str, Any]]:
        asked = []
        for question in questions:
            answer = await services.ask(question, generate=True, top_k=_TOP_K)
            repeated = await services.ask(question, generate=True, top_k=_TOP_K)
            self._show.print(f"\n? {question}", style="bold green")
            show_answer(answer, self._show)
            how = "from the cache" if repeated["cached"] else "not cached"
            self._show.print(f"repeated: {repeated['query_time_ms']:.2f} ms, {how}", style="dim")
            asked.append(
                {
                    "question": question,
                    "answer": answer["answer"],
                    "sources": [result["document_id"] for result in answer["results"]],
                    "query_ms": answer["query_time_ms"],
                    "repeated_ms": repeated["query_time_ms"],
                    "repeated_from_cache": repeated["cached"],
                }
            )
        return asked

    async def _edit(self, services: Services, document: Text) -> list[_Edited]:
        """Edit a document several times, each time until the answer contains the edit."""
        question = _review_question(document)
        before = await services.ask(question, generate=True, top_k=_TOP_K)
        self._show.print(f"\n? {question}", style="bold green")
        self._show.print(f"before the edit: {_text_of(before)}")
        edits: list[_Edited] = []
        for number in range(_EDITS):
            # All minutes differ, so that each fact is unique.
            fact = f"{_DAYS[number % len(_DAYS)]} at {secrets.randbelow(24):02}:{number + 10}"
            edits.append(await _time_edit(services, document, question, fact))
        first, last = edits[0], edits[-1]
        self._show.print(f"edited {document.document_id}, {first.freshness_ms:.1f} ms later: {_text_of(first.answer)}")
        self._show.print(f"edited for the {_EDITS}th time, {last.freshness_ms:.1f} ms later: {_text_of(last.answer)}")
        figures = spread([edit.freshness_ms for edit in edits])
        self._show.print(
            f"{_EDITS} edits, from the 202 to the answer that contains it: median {figures['p50']} ms, "
            f"95th percentile {figures['p95']} ms, longest {figures['max']} ms",
            style="bold",
        )
        for name, median_ms in _medians([edit.stages_ms for edit in edits]).items():
            self._show.print(f"  {name:12} {median_ms:7.1f} ms after acceptance (median)", style="dim")
        return edits

    async def _delete(self, services: Services, document: Text) -> float:
        question = _review_question(document)
        accepted = await services.delete(document.document_id)
        began_s = time.perf_counter()
        answer = await services.ask(question, generate=True, top_k=_TOP_K, min_position=accepted["position"])
        deleted_ms = round((time.perf_counter() - began_s) * 1000, 1)
        if any(result["document_id"] == document.document_id for result in answer["results"]):
            raise ServiceFailed(
                f"{document.document_id} is still in the answer at {accepted['position']}, where it is deleted"
            )
        self._show.print(
            f"deleted {document.document_id}, absent from answers {deleted_ms} ms later: {_text_of(answer)}",
            style="bold",
        )
        return deleted_ms

    async def _documents(self) -> int:
        return await self._count(
            self._settings.names.manifests_index(self._settings.generation), {"term": {"state": "live"}}
        )

    async def _chunks(self) -> int:
        return await self._count(self._settings.names.chunks_alias, {"match_all": {}})

    async def _count(self, index: str, query: dict[str, Any]) -> int:
        client = connect(self._settings.opensearch)
        try:
            await client.indices.refresh(index=index)
            return int((await client.count(index=index, body={"query": query}))["count"])
        finally:
            await client.close()


async def _time_edit(services: Services, document: Text, question: str, fact: str) -> _Edited:
    """Write a fact into a document and ask for it.

    Raises:
        ServiceFailed: the answer at the position of the edit does not contain it.
    """
    heading = "\n## Review\n" if document.content_type == "text/markdown" else ""
    content = f"{document.content}\n{heading}\nThe Freshline demo review of {document.name} is on {fact}.\n"
    await services.ask(question, generate=True, top_k=_TOP_K)  # caches the answer without the fact
    accepted = await services.put(document.document_id, content.encode(), document.content_type)
    began_s = time.perf_counter()
    answer = await services.ask(question, generate=True, top_k=_TOP_K, min_position=accepted["position"])
    freshness_ms = (time.perf_counter() - began_s) * 1000
    if not any(fact in result["text"] for result in answer["results"]):
        raise ServiceFailed(f"the answer to {question!r} does not contain the edit at {accepted['position']}")
    status = await services.ended(accepted["event_id"])
    return _Edited(fact, freshness_ms, status["stages_ms"], answer)


def _review_question(document: Text) -> str:
    return f"When is the Freshline demo review of {document.name}?"


def _text_of(answer: Mapping[str, Any]) -> str:
    return str(answer["answer"] or "no answer").replace("\n", " ")


def _medians(stages: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Stage → median over the edits that report it."""
    names = dict.fromkeys(name for one in stages for name in one)
    return {name: round(statistics.median(one[name] for one in stages if name in one), 1) for name in names}


def _print_addresses(settings: Settings, home: Path) -> None:
    key = settings.tenant.api_key
    err.print("\nServing until Ctrl-C:", style="bold")
    err.print(f"  console                  {console_url(settings)}")
    err.print(f"  query API                http://{settings.query.host}:{settings.query.port}/v1/query")
    err.print(f"  ingest API               http://{settings.ingest.host}:{settings.ingest.port}/v1/documents")
    if key:
        err.print(f"  API key                  {key.get_secret_value()}")
    err.print(f'  in another terminal      freshline ask --data {home} "…"')
