"""``ingest`` and ``delete``: sending documents."""

import asyncio
import gzip
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from freshline.cli.terminal import (
    MISUSED,
    UNFINISHED,
    Data,
    Json,
    add_command,
    err,
    fail,
    out,
    print_json,
    stopped_like_ctrl_c,
)

if TYPE_CHECKING:  # the connectors are heavy, and only run when a command does
    from freshline.cli.ingest_report import Report
    from infra.settings import Settings
    from ingest.connectors.client import IngestClient, Progress, Summary
    from ingest.connectors.outcomes import EventOutcomes

_FOLLOW_S: Final = 0.5
"""Pause between two questions for the outcomes of what a source without an end has sent."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_command(app, ingest)
    add_command(app, delete)


def ingest(
    *,
    directory: Annotated[Path | None, typer.Argument(exists=True, file_okay=False, help="Directory to ingest.")] = None,
    git: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="Git repository to ingest.")] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="With --git: replay the history from this revision.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="With --git: go on with new commits.")] = False,
    events: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Recorded history to ingest, .jsonl or .jsonl.gz.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="With a directory: go on with every change.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Delete even where a listing lacks much of what was there.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="Name of the source, which owns its documents; by default made of where it is.")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Put before every document id, as it is: handbook/")] = "",
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Replace and delete documents that another source owns, and own them.")
    ] = False,
    wait: Annotated[
        bool | None,
        typer.Option(
            help="Wait for the end of every event; by default on a terminal, and with --watch and --follow, where it "
            "names what does not become searchable."
        ),
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Exit with 0 where nothing failed but something was left out.")
    ] = False,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0, help="Longest such wait, in seconds.")] = 3600,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Send documents, their updates and their deletes. Running it again sends only what has changed.

    What is not searchable in the end is named, with the reason: on a terminal the first 20 of each kind, with --json
    all. `searchable` in the JSON is true where everything that this run had to send is searchable.

    Exit codes, the first that is true: 1, a document was refused or could not be processed; the others are sent. 3, an
    event had not ended when --timeout was over; it goes on. 4, nothing failed, but something was left out: files
    without text, files of other types, documents of which the service has a newer version. 0, everything is sent, and
    searchable if it was waited for. Without waiting only refusals and files of other types are known.

    Examples:
      freshline ingest ./handbook
      freshline ingest ./handbook --watch
      freshline ingest ./team-b/handbook --prefix team-b/
      freshline ingest --git ./wiki --from v1.0 --follow
      freshline ingest --events history.jsonl.gz --wait --json
    """
    if sum(source is not None for source in (directory, git, events)) != 1:
        raise fail("name one source: a directory, --git REPO or --events FILE", MISUSED)
    if (watch and directory is None) or ((follow or start) and git is None):
        raise fail("--watch goes with a directory; --from and --follow go with --git", MISUSED)
    from freshline.installation import find  # noqa: PLC0415 - heavy
    from ingest.connectors.guard import TooManyDeletions  # noqa: PLC0415 - as above

    source = Source(
        directory,
        git,
        events,
        start=start,
        endless=watch or follow,
        yes=yes,
        name=name,
        prefix=prefix,
        take_over=take_over,
    )
    waits = (source.endless or sys.stderr.isatty()) if wait is None else wait
    wait_s = timeout_s if waits else None
    try:
        with stopped_like_ctrl_c():
            report = asyncio.run(send_and_wait(find(data), source, wait_s))
    except TooManyDeletions as error:
        raise fail(f"{error}: --yes") from None
    except KeyboardInterrupt:
        if source.endless:  # that is how watching ends
            return
        raise
    report.show_findings()
    if as_json:
        print_json(report.as_json())
    else:
        report.show_counts()
    if report.error is not None:
        raise report.error
    if code := report.exit_code(allow_partial=allow_partial):
        raise typer.Exit(code)


def delete(
    *,
    document_id: Annotated[str, typer.Argument(help="Document to delete.")],
    wait: Annotated[bool, typer.Option(help="Return when it is gone from all answers.")] = True,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Delete a document; it is gone from all answers when this returns with exit code 0.

    Exit codes: 1, it is not deleted, since a newer version stands or the deletion could not be processed. 3, the
    deletion is accepted, but had not ended after a minute.

    Examples:
      freshline delete guides/travel.md
      freshline delete guides/travel.md --no-wait --json
    """
    from freshline.installation import find  # noqa: PLC0415 - heavy

    deletion = asyncio.run(_delete(find(data), document_id, wait=wait))
    if as_json:
        print_json(deletion)
    outcome = deletion.get("outcome")
    if not wait or outcome == "done":
        if not as_json:
            done = "is deleted" if wait else "will be deleted"
            out.print(f"{document_id} {done}, version {deletion['version']}, position {deletion['position']}")
        return
    if outcome is None:
        raise fail(
            f"the deletion of {document_id} is accepted but has not ended yet: `freshline lag` shows whether workers "
            f"are there; GET /v1/events/{deletion['event_id']} tells how it ends",
            UNFINISHED,
        )
    raise fail(f"{document_id} is not deleted: {outcome}: {deletion['reason']}")


@dataclass(frozen=True, slots=True)
class Source:
    """Where documents come from: exactly one of the three; and how, as the options of ``ingest`` say."""

    directory: Path | None = None
    git: Path | None = None
    events: Path | None = None
    _: KW_ONLY
    start: str | None = None
    endless: bool = False
    yes: bool = False
    name: str | None = None
    prefix: str = ""
    take_over: bool = False
    log_path: Path | None = None

    async def send(self, client: "IngestClient", told: "Progress") -> "Summary":
        """Send everything; see the connectors for what can go wrong and for ``log_path``."""
        from ingest.connectors.event_file import ingest_event_file  # noqa: PLC0415 - heavy
        from ingest.connectors.folder import ingest_folder  # noqa: PLC0415 - as above
        from ingest.connectors.git import ingest_git  # noqa: PLC0415 - as above
        from ingest.connectors.source import SourceOptions  # noqa: PLC0415 - as above

        options = SourceOptions(self.name, self.prefix, self.take_over)
        if self.directory is not None:
            return await ingest_folder(
                client, self.directory, options, watch=self.endless, yes=self.yes, progress=told, log_path=self.log_path
            )
        if self.git is not None:
            return await ingest_git(
                client,
                self.git,
                options,
                start=self.start,
                follow=self.endless,
                yes=self.yes,
                progress=told,
                log_path=self.log_path,
            )
        if self.events is not None:
            return await ingest_event_file(client, self.events, options, progress=told, log_path=self.log_path)
        raise ValueError("there is no source")

    def count(self) -> int | None:
        """How many events a first run sends, where that can be told beforehand."""
        from ingest.connectors.files import list_folder  # noqa: PLC0415 - heavy

        if self.directory is not None and not self.endless:
            root = self.directory.resolve()
            return len(list_folder(root, root).files)
        if self.events is not None:
            with gzip.open(self.events) if self.events.suffix == ".gz" else self.events.open("rb") as lines:
                return sum(1 for _ in lines)
        return None


async def send_and_wait(settings: "Settings", source: Source, wait_s: float | None) -> "Report":
    """Send everything, showing progress; then ask how each event ended, unless ``wait_s`` is None.

    A source without an end is followed, and what does not become searchable is told, until it is cancelled.

    Raises:
        Exception: nothing was sent. What ended a run that had sent something is in the report.
    """
    from freshline.cli.ingest_report import Report  # noqa: PLC0415 - heavy
    from freshline.services import ingest_client  # noqa: PLC0415 - as above
    from ingest.connectors.client import ServiceUnavailable  # noqa: PLC0415 - as above
    from ingest.connectors.outcomes import EventOutcomes, wait_for_outcomes  # noqa: PLC0415 - as above

    total = await asyncio.to_thread(source.count)
    async with ingest_client(settings) as client:
        outcomes = EventOutcomes()
        if source.endless:
            async with _followed(client, outcomes, wanted=wait_s is not None):
                with _progress_shown(total, outcomes) as told:
                    return Report(await source.send(client, told), outcomes, wait_s)
        summary, error = await _sent(client, source, total)
        if wait_s is not None and summary.events and not isinstance(error, ServiceUnavailable):
            outcomes.expect(summary.events)
            with _outcomes_shown(len(summary.events)) as known:
                await wait_for_outcomes(client, outcomes, timeout_s=wait_s, told=known)
        return Report(summary, outcomes, wait_s, error)


async def _sent(client: "IngestClient", source: Source, total: int | None) -> "tuple[Summary, Exception | None]":
    """What was sent, and the error that kept the rest from it."""
    latest: list[Summary] = []
    with _progress_shown(total) as told:

        def note(summary: "Summary") -> None:
            latest[:] = [summary]
            told(summary)

        try:
            return await source.send(client, note), None
        except Exception as error:
            if not latest:
                raise
            return latest[0], error


@asynccontextmanager
async def _followed(client: "IngestClient", outcomes: "EventOutcomes", *, wanted: bool) -> "AsyncIterator[None]":
    """While the context lasts, name each expected event that ends without becoming searchable; or just forget them."""
    from freshline.cli.ingest_report import show_ended  # noqa: PLC0415 - heavy
    from ingest.connectors.client import Refused, ServiceUnavailable  # noqa: PLC0415 - as above

    async def follow() -> None:
        while True:
            try:
                await outcomes.read(client)
            except (Refused, ServiceUnavailable) as error:
                err.print(f"how events end is not known for now: {error}", style="red")
            show_ended(outcomes.ended)
            outcomes.ended.clear()
            await asyncio.sleep(_FOLLOW_S)

    async def forget() -> None:
        while True:
            outcomes.forget()
            await asyncio.sleep(_FOLLOW_S)

    following = asyncio.create_task(follow() if wanted else forget())
    try:
        yield
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


@contextmanager
def _progress_shown(total: int | None, endless: "EventOutcomes | None" = None) -> "Iterator[Progress]":
    """A bar with the rate, while the context lasts.

    A source without an end gives its events to ``endless``, names at once what it does not send, and keeps a log.
    """
    from rich import progress  # noqa: PLC0415 - heavy

    from freshline.cli.ingest_report import counts, passed_over, refused, show_lines  # noqa: PLC0415 - as above

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeElapsedColumn(),
    )
    failures, last = 0, ""
    named: set[str] = set()
    with progress.Progress(*columns, console=err) as bar:
        task = bar.add_task("documents sent", total=total, rate="")

        def told(summary: "Summary") -> None:
            nonlocal failures, last
            done = summary.sent + summary.skipped + summary.deleted + len(summary.failed)
            elapsed_s = bar.tasks[task].elapsed
            rate = f"{(summary.sent + summary.deleted) / elapsed_s:.0f}/s" if elapsed_s and endless is None else ""
            bar.update(task, completed=done, rate=rate)
            if endless is not None:
                endless.expect(summary.events)
                summary.events.clear()
                show_lines([refused(one.document_id, one.reason) for one in summary.failed[failures:]], style="red")
                failures = len(summary.failed)
                show_lines([passed_over(*one) for one in summary.passed_over.items() if one[0] not in named])
                named.update(summary.passed_over)
                if not err.is_terminal and (now := counts(summary)) != last:
                    err.print(now)
                    last = now

        yield told
        bar.update(task, total=bar.tasks[task].completed)


@contextmanager
def _outcomes_shown(total: int) -> "Iterator[Callable[[EventOutcomes], None]]":
    """A bar of the events that have ended, while the context lasts."""
    from rich import progress  # noqa: PLC0415 - heavy

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=err) as bar:
        task = bar.add_task("events ended", total=total)
        yield lambda outcomes: bar.update(task, completed=len(outcomes.ended))


async def _delete(settings: "Settings", document_id: str, *, wait: bool) -> dict[str, Any]:
    """The accepted deletion; where it was waited for, with its outcome, which is None if it has not ended."""
    from freshline.services import NotEnded, connect_services  # noqa: PLC0415 - heavy

    async with connect_services(settings) as services:
        accepted = await services.delete(document_id)
        if not wait:
            return accepted
        try:
            status = await services.ended(accepted["event_id"], accepted["position"])
        except NotEnded:
            return {**accepted, "outcome": None, "reason": None}
        return {**accepted, "outcome": status["outcome"], "reason": status["reason"]}
