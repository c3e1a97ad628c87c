"""``ingest`` and ``delete``: sending documents."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from freshline.terminal import err, fail, out, print_json

if TYPE_CHECKING:  # the connectors are heavy, and only run when a command does
    from ingest.connectors.client import Summary

Json = Annotated[bool, typer.Option("--json", help="One line of JSON, last on standard output.")]

_WAIT_S = 3_600.0


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(ingest)
    app.command()(delete)


def ingest(
    *,
    directory: Annotated[Path | None, typer.Argument(exists=True, file_okay=False, help="Directory to ingest.")] = None,
    git: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="Git repository to ingest.")] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="With --git: replay the history from this revision.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="With --git: go on with new commits.")] = False,
    events: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Recorded history to ingest.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="With a directory: go on with every change.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Delete even where a listing lacks much of what was there.")
    ] = False,
    wait: Annotated[bool, typer.Option(help="Wait until everything is searchable.")] = True,
    as_json: Json = False,
) -> None:
    r"""Send documents, their updates and their deletes. Running it again sends only what has changed.

    \b
    Examples:
      freshline ingest ./handbook
      freshline ingest ./handbook --watch
      freshline ingest --git ./wiki --from v1.0 --follow
      freshline ingest --events history.jsonl.gz --json
    """
    sources = [source for source in (directory, git, events) if source is not None]
    if len(sources) != 1:
        raise fail("name one source: a directory, --git REPO or --events FILE", 2)
    if (watch and directory is None) or ((follow or start) and git is None):
        raise fail("--watch goes with a directory; --from and --follow go with --git", 2)
    summary, outcomes = asyncio.run(
        _ingest(directory, git, events, start=start, endless=watch or follow, yes=yes, wait=wait)
    )
    for failure in summary.failed[:20]:
        err.print(f"not sent: {failure.document_id}: {failure.reason}", markup=False)
    figures = {
        "sent": summary.sent,
        "unchanged": summary.skipped,
        "deleted": summary.deleted,
        "failed": len(summary.failed),
        "positions": summary.positions,
        "outcomes": outcomes,
    }
    if as_json:
        print_json(figures)
    else:
        out.print(
            f"{summary.sent} sent, {summary.skipped} unchanged, {summary.deleted} deleted, {len(summary.failed)} failed"
            + ("; all searchable" if wait else "")
        )
    if summary.failed:
        raise typer.Exit(1)


def delete(
    *,
    document_id: Annotated[str, typer.Argument(help="Document to delete.")],
    as_json: Json = False,
) -> None:
    r"""Delete a document; it is gone from all answers when this returns.

    \b
    Examples:
      freshline delete guides/travel.md
      freshline delete guides/travel.md --json
    """
    accepted = asyncio.run(_delete(document_id))
    if as_json:
        print_json(accepted)
    else:
        out.print(
            f"{document_id} is deleted, version {accepted['version']}, position {accepted['position']}", markup=False
        )


async def _ingest(
    directory: Path | None,
    git: Path | None,
    events: Path | None,
    *,
    start: str | None,
    endless: bool,
    yes: bool,
    wait: bool,
) -> "tuple[Summary, dict[str, int]]":
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    from freshline.installation import find  # noqa: PLC0415 - heavy
    from ingest.connectors.client import connect_ingest, wait_until_applied  # noqa: PLC0415 - as above
    from ingest.connectors.event_file import ingest_event_file  # noqa: PLC0415 - as above
    from ingest.connectors.folder import ingest_folder  # noqa: PLC0415 - as above
    from ingest.connectors.git import ingest_git  # noqa: PLC0415 - as above

    settings = find()
    key = settings.tenant.api_key.get_secret_value() if settings.tenant.api_key else None
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    url = f"http://{settings.ingest.host}:{settings.ingest.port}"
    with Progress(*columns, TimeElapsedColumn(), console=err, transient=False) as bar:
        task = bar.add_task("documents", total=None, rate="")

        def told(summary: "Summary") -> None:
            done = summary.sent + summary.skipped + summary.deleted + len(summary.failed)
            elapsed = bar.tasks[task].elapsed or 0
            bar.update(task, completed=done, rate=f"{done / elapsed:.0f}/s" if elapsed else "")

        async with connect_ingest(url, key) as client:
            if directory is not None:
                summary = await ingest_folder(client, directory, watch=endless, yes=yes, progress=told)
            elif git is not None:
                summary = await ingest_git(client, git, start=start, follow=endless, yes=yes, progress=told)
            else:
                summary = await ingest_event_file(client, _given(events), progress=told)
            outcomes = {}
            if wait and summary.last_events:
                bar.update(task, description="waiting until searchable")
                ended = await wait_until_applied(client, summary, timeout_s=_WAIT_S)
                outcomes = {str(outcome): count for outcome, count in ended.items()}
            return summary, outcomes


def _given(events: Path | None) -> Path:
    if events is None:
        raise fail("name one source: a directory, --git REPO or --events FILE", 2)
    return events


async def _delete(document_id: str) -> dict[str, object]:
    from freshline.installation import find  # noqa: PLC0415 - heavy
    from freshline.services import connect_services  # noqa: PLC0415 - as above

    async with connect_services(find()) as services:
        accepted = await services.delete(document_id)
        await services.ended(accepted["event_id"])
        return accepted
