"""``ingest`` and ``delete``: send documents and deletions."""

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

if TYPE_CHECKING:  # heavy
    from freshline.cli.ingest_report import Report
    from infra.settings import Settings
    from ingest.connectors.client import IngestClient, Progress, Summary
    from ingest.connectors.outcomes import EventOutcomes

_FOLLOW_S: Final = 0.5
"""Interval at which the outcomes of an unbounded source's events are polled."""


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
    follow: Annotated[bool, typer.Option("--follow", help="With --git: keep sending new commits.")] = False,
    events: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Recorded history to ingest, .jsonl or .jsonl.gz.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="With a directory: keep sending changes.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Confirm the deletion of more than 10 documents that are over 10 % of all.")
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the source, which owns its documents. Default: derived from machine and path."),
    ] = None,
    prefix: Annotated[str, typer.Option(help="Prefix of every document id, such as handbook/")] = "",
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Replace and delete documents of other sources, and become the owner.")
    ] = False,
    wait: Annotated[
        bool | None,
        typer.Option(
            help="Wait for the outcome of every event. Default: on a terminal, and with --watch and --follow, which "
            "print the documents that do not become searchable."
        ),
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Exit with 0 instead of 4 if documents or files were skipped.")
    ] = False,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0, help="Timeout of --wait in seconds.")] = 3600,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Send documents, updates and deletions. A repeated run sends changes only.

    Documents that do not become searchable are listed with the reason: the first 20 of each kind on a terminal, all
    with --json. `searchable` in the JSON is true if everything that this run sent is searchable.

    Exit codes, the first that applies: 1, a document was rejected or could not be processed; all others were sent. 3,
    an event was still in progress at the timeout. 4, nothing failed, but something was skipped: files without text,
    files of unsupported types, documents of which the service has a newer version. 0, everything was sent and, with
    --wait, is searchable. Without --wait only rejections and unsupported files are known.

    Examples:
      freshline ingest ./handbook
      freshline ingest ./handbook --watch
      freshline ingest ./team-b/handbook --prefix team-b/
      freshline ingest --git ./wiki --from v1.0 --follow
      freshline ingest --events history.jsonl.gz --wait --json
    """
    if sum(source is not None for source in (directory, git, events)) != 1:
        raise fail("give one source: a directory, --git REPO or --events FILE", MISUSED)
    if (watch and directory is None) or ((follow or start) and git is None):
        raise fail("--watch requires a directory; --from and --follow require --git", MISUSED)
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
        if source.endless:  # Ctrl-C is how watching ends
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
    document_id: Annotated[str, typer.Argument(help="Id of the document.")],
    wait: Annotated[bool, typer.Option(help="Wait until no answer contains the document.")] = True,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Delete a document. After exit code 0, no answer contains it, cached or not.

    Exit codes: 1, it was not deleted: a newer version exists, or the deletion could not be processed. 3, the deletion
    is accepted, but was still in progress after a minute.

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
            f"the deletion of {document_id} is accepted but still in progress: check for active workers with "
            f"`freshline lag`; GET /v1/events/{deletion['event_id']} returns its outcome",
            UNFINISHED,
        )
    raise fail(f"{document_id} is not deleted: {outcome}: {deletion['reason']}")


@dataclass(frozen=True, slots=True)
class Source:
    """A source of documents, exactly one of the three, with the options of ``ingest``."""

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

    async def send(self, client: "IngestClient", progress: "Progress") -> "Summary":
        """Send everything. Errors and ``log_path``: see the connectors."""
        from ingest.connectors.event_file import ingest_event_file  # noqa: PLC0415 - heavy
        from ingest.connectors.folder import ingest_folder  # noqa: PLC0415 - as above
        from ingest.connectors.git import ingest_git  # noqa: PLC0415 - as above
        from ingest.connectors.source import SourceOptions  # noqa: PLC0415 - as above

        options = SourceOptions(self.name, self.prefix, self.take_over)
        if self.directory is not None:
            return await ingest_folder(
                client,
                self.directory,
                options,
                watch=self.endless,
                yes=self.yes,
                progress=progress,
                log_path=self.log_path,
            )
        if self.git is not None:
            return await ingest_git(
                client,
                self.git,
                options,
                start=self.start,
                follow=self.endless,
                yes=self.yes,
                progress=progress,
                log_path=self.log_path,
            )
        if self.events is not None:
            return await ingest_event_file(client, self.events, options, progress=progress, log_path=self.log_path)
        raise ValueError("there is no source")

    def count(self) -> int | None:
        """Number of events that a first run sends; None if unknown."""
        from ingest.connectors.files import list_folder  # noqa: PLC0415 - heavy

        if self.directory is not None and not self.endless:
            root = self.directory.resolve()
            return len(list_folder(root, root).files)
        if self.events is not None:
            with gzip.open(self.events) if self.events.suffix == ".gz" else self.events.open("rb") as lines:
                return sum(1 for _ in lines)
        return None


async def send_and_wait(settings: "Settings", source: Source, wait_s: float | None) -> "Report":
    """Send everything and show progress; then wait for the outcome of each event, unless ``wait_s`` is None.

    An unbounded source is followed until cancellation. Documents that do not become searchable are printed.

    Raises:
        Exception: nothing was sent. An error after the first event is in the report.
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
                with _progress_shown(total, outcomes) as progress:
                    return Report(await source.send(client, progress), outcomes, wait_s)
        summary, error = await _sent(client, source, total)
        if wait_s is not None and summary.events and not isinstance(error, ServiceUnavailable):
            outcomes.expect(summary.events)
            with _outcomes_shown(len(summary.events)) as show_outcomes:
                await wait_for_outcomes(client, outcomes, timeout_s=wait_s, progress=show_outcomes)
        return Report(summary, outcomes, wait_s, error)


async def _sent(client: "IngestClient", source: Source, total: int | None) -> "tuple[Summary, Exception | None]":
    """Send everything; returns the summary, and the error that ended the run early, if any."""
    latest: list[Summary] = []
    with _progress_shown(total) as progress:

        def note(summary: "Summary") -> None:
            latest[:] = [summary]
            progress(summary)

        try:
            return await source.send(client, note), None
        except Exception as error:
            if not latest:
                raise
            return latest[0], error


@asynccontextmanager
async def _followed(client: "IngestClient", outcomes: "EventOutcomes", *, wanted: bool) -> "AsyncIterator[None]":
    """Poll outcomes and print documents that do not become searchable; if not ``wanted``, discard expected events."""
    from freshline.cli.ingest_report import show_ended  # noqa: PLC0415 - heavy
    from ingest.connectors.client import Rejected, ServiceUnavailable  # noqa: PLC0415 - as above

    async def follow() -> None:
        while True:
            try:
                await outcomes.read(client)
            except (Rejected, ServiceUnavailable) as error:
                err.print(f"outcomes of events cannot be read: {error}", style="red")
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
    """Show a progress bar with the rate.

    For an unbounded source, ``endless`` receives the sent events; documents that are not sent are printed at once,
    and on standard error that is not a terminal, the counts whenever they change.
    """
    from rich import progress  # noqa: PLC0415 - heavy

    from freshline.cli.ingest_report import counts, rejected, show_lines, skipped  # noqa: PLC0415 - as above

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeElapsedColumn(),
    )
    failures, last = 0, ""
    printed: set[str] = set()
    with progress.Progress(*columns, console=err) as bar:
        task = bar.add_task("documents sent", total=total, rate="")

        def update(summary: "Summary") -> None:
            nonlocal failures, last
            done = summary.sent + summary.skipped + summary.deleted + len(summary.failed)
            elapsed_s = bar.tasks[task].elapsed
            rate = f"{(summary.sent + summary.deleted) / elapsed_s:.0f}/s" if elapsed_s and endless is None else ""
            bar.update(task, completed=done, rate=rate)
            if endless is not None:
                endless.expect(summary.events)
                summary.events.clear()
                new = summary.failed[failures:]
                show_lines([rejected(failure.document_id, failure.reason) for failure in new], style="red")
                failures = len(summary.failed)
                show_lines([skipped(*item) for item in summary.ignored_files.items() if item[0] not in printed])
                printed.update(summary.ignored_files)
                if not err.is_terminal and (now := counts(summary)) != last:
                    err.print(now)
                    last = now

        yield update
        bar.update(task, total=bar.tasks[task].completed)


@contextmanager
def _outcomes_shown(total: int) -> "Iterator[Callable[[EventOutcomes], None]]":
    """Show a progress bar of the events with an outcome."""
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
    """Delete a document; the result includes the outcome if ``wait``, which is None if it is in progress."""
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
