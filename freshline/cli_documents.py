"""``ingest`` and ``delete``: sending documents."""

import asyncio
import gzip
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from freshline.terminal import FAILED, MISUSED, Data, Json, add_command, err, fail, out, print_json, stopped_like_ctrl_c

if TYPE_CHECKING:  # the connectors are heavy, and only run when a command does
    from infra.settings import Settings
    from ingest.connectors.client import Failure, IngestClient, Progress, Summary

_SHOWN_FAILURES: Final = 20


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
    wait: Annotated[
        bool | None, typer.Option(help="Wait until everything is searchable; by default on a terminal.")
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0, help="Longest such wait, in seconds.")] = 3600,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Send documents, their updates and their deletes. Running it again sends only what has changed.

    Exits with 1 if a document was refused, or one of the last ones could not be processed; the others are sent.

    Examples:
      freshline ingest ./handbook
      freshline ingest ./handbook --watch
      freshline ingest --git ./wiki --from v1.0 --follow
      freshline ingest --events history.jsonl.gz --wait --json
    """
    if sum(source is not None for source in (directory, git, events)) != 1:
        raise fail("name one source: a directory, --git REPO or --events FILE", MISUSED)
    if (watch and directory is None) or ((follow or start) and git is None):
        raise fail("--watch goes with a directory; --from and --follow go with --git", MISUSED)
    from freshline.installation import find  # noqa: PLC0415 - heavy
    from ingest.connectors.guard import TooManyDeletions  # noqa: PLC0415 - as above

    source = Source(directory, git, events, start=start, endless=watch or follow, yes=yes)
    wait_s = timeout_s if (sys.stderr.isatty() if wait is None else wait) else None
    try:
        with stopped_like_ctrl_c():
            summary, outcomes = asyncio.run(send_and_wait(find(data), source, wait_s))
    except TooManyDeletions as error:
        raise fail(f"{error}: --yes") from None
    except KeyboardInterrupt:
        if source.endless:  # that is how watching ends
            return
        raise
    _report(summary, outcomes, waited=wait_s is not None, as_json=as_json)


def delete(
    *,
    document_id: Annotated[str, typer.Argument(help="Document to delete.")],
    wait: Annotated[bool, typer.Option(help="Return when it is gone from all answers.")] = True,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Delete a document; it is gone from all answers when this returns.

    Examples:
      freshline delete guides/travel.md
      freshline delete guides/travel.md --no-wait --json
    """
    from freshline.installation import find  # noqa: PLC0415 - heavy

    accepted = asyncio.run(_delete(find(data), document_id, wait=wait))
    if as_json:
        print_json(accepted)
    else:
        done = "is deleted" if wait else "will be deleted"
        out.print(f"{document_id} {done}, version {accepted['version']}, position {accepted['position']}")


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
    log_path: Path | None = None

    async def send(self, client: "IngestClient", told: "Progress") -> "Summary":
        """Send everything; see the connectors for what can go wrong and for ``log_path``."""
        from ingest.connectors.event_file import ingest_event_file  # noqa: PLC0415 - heavy
        from ingest.connectors.folder import ingest_folder  # noqa: PLC0415 - as above
        from ingest.connectors.git import ingest_git  # noqa: PLC0415 - as above

        if self.directory is not None:
            return await ingest_folder(
                client, self.directory, watch=self.endless, yes=self.yes, progress=told, log_path=self.log_path
            )
        if self.git is not None:
            return await ingest_git(
                client,
                self.git,
                start=self.start,
                follow=self.endless,
                yes=self.yes,
                progress=told,
                log_path=self.log_path,
            )
        if self.events is not None:
            return await ingest_event_file(client, self.events, progress=told, log_path=self.log_path)
        raise ValueError("there is no source")

    def count(self) -> int | None:
        """How many events a first run sends, where that can be told beforehand."""
        from ingest.connectors.folder import list_folder  # noqa: PLC0415 - heavy

        if self.directory is not None and not self.endless:
            root = self.directory.resolve()
            return len(list_folder(root, root))
        if self.events is not None:
            with gzip.open(self.events) if self.events.suffix == ".gz" else self.events.open("rb") as lines:
                return sum(1 for _ in lines)
        return None


def _report(summary: "Summary", outcomes: dict[str, int], *, waited: bool, as_json: bool) -> None:
    for failure in summary.failed[:_SHOWN_FAILURES]:
        err.print(_failed(failure), style="red")
    if len(summary.failed) > _SHOWN_FAILURES:
        err.print(f"… and {len(summary.failed) - _SHOWN_FAILURES} more", style="red")
    dead = outcomes.get("dead_letter", 0)
    if dead:
        err.print(f"{dead} of the last events could not be processed: see `freshline verify`", style="red")
    searchable = waited and not dead
    if as_json:
        print_json(
            {
                "sent": summary.sent,
                "unchanged": summary.skipped,
                "deleted": summary.deleted,
                "failed": len(summary.failed),
                "searchable": searchable,
                "positions": summary.positions,
                "outcomes": outcomes,
            }
        )
    else:
        tail = "; all that was sent is searchable" if searchable else ""
        out.print(f"{_counts(summary)}{tail}")
    if summary.failed or dead:
        raise typer.Exit(FAILED)


async def send_and_wait(settings: "Settings", source: Source, wait_s: float | None) -> "tuple[Summary, dict[str, int]]":
    """Send everything, showing progress; then wait until it is searchable, unless ``wait_s`` is None.

    Returns:
        What was sent; and how the last event of each partition ended, outcome → partitions.

    Raises:
        TimeoutError: it is not searchable after ``wait_s``.
    """
    from freshline.services import ingest_client  # noqa: PLC0415 - heavy
    from ingest.connectors.client import wait_until_applied  # noqa: PLC0415 - as above

    total = await asyncio.to_thread(source.count)
    async with ingest_client(settings) as client:
        with _progress_shown(total, endless=source.endless) as told:
            summary = await source.send(client, told)
        if wait_s is None or not summary.last_events:
            return summary, {}
        with err.status("waiting until everything is searchable …"):
            ended = await wait_until_applied(client, summary, timeout_s=wait_s)
        return summary, {str(outcome): count for outcome, count in ended.items()}


@contextmanager
def _progress_shown(total: int | None, *, endless: bool) -> "Iterator[Progress]":
    """A bar with the rate, while the context lasts. What has no end tells of failures at once, and keeps a log."""
    from rich import progress  # noqa: PLC0415 - heavy

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeElapsedColumn(),
    )
    failures, last = 0, ""
    with progress.Progress(*columns, console=err) as bar:
        task = bar.add_task("documents sent", total=total, rate="")

        def told(summary: "Summary") -> None:
            nonlocal failures, last
            done = summary.sent + summary.skipped + summary.deleted + len(summary.failed)
            elapsed_s = bar.tasks[task].elapsed
            rate = f"{(summary.sent + summary.deleted) / elapsed_s:.0f}/s" if elapsed_s and not endless else ""
            bar.update(task, completed=done, rate=rate)
            if endless:
                for failure in summary.failed[failures:]:
                    err.print(_failed(failure), style="red")
                failures = len(summary.failed)
                if not err.is_terminal and (counts := _counts(summary)) != last:
                    err.print(counts)
                    last = counts

        yield told
        bar.update(task, total=bar.tasks[task].completed)


def _failed(failure: "Failure") -> str:
    return f"not sent: {failure.document_id}: {failure.reason}"


def _counts(summary: "Summary") -> str:
    changed = f"{summary.sent} sent, {summary.skipped} unchanged, {summary.deleted} deleted"
    return f"{changed}, {len(summary.failed)} failed"


async def _delete(settings: "Settings", document_id: str, *, wait: bool) -> dict[str, object]:
    from freshline.services import connect_services  # noqa: PLC0415 - heavy

    async with connect_services(settings) as services:
        accepted = await services.delete(document_id)
        if wait:
            await services.ended(accepted["event_id"])
        return accepted
