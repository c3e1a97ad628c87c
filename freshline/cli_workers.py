"""``worker``, ``serve``, ``lag`` and ``verify``: the processes, and how they are doing."""

import asyncio
from enum import StrEnum
from typing import Annotated

import typer

from freshline.terminal import fail, out, print_json

Json = Annotated[bool, typer.Option("--json", help="One line of JSON, last on standard output.")]


class Service(StrEnum):
    """The HTTP services."""

    INGEST = "ingest"
    QUERY = "query"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(worker)
    app.command()(serve)
    app.command()(lag)
    app.command()(verify)


def worker(
    *, steps: Annotated[list[str] | None, typer.Argument(help="prepare, index, invalidate; all if none.")] = None
) -> None:
    r"""Run steps of the stream in this process, with the settings of the environment.

    \b
    Examples:
      freshline worker
      freshline worker prepare
      freshline worker index invalidate
    """
    import uvloop  # noqa: PLC0415 - heavy

    from infra.settings import Settings  # noqa: PLC0415 - as above
    from streams.topology import StepName  # noqa: PLC0415 - as above
    from streams.worker import work  # noqa: PLC0415 - as above

    known = [str(step) for step in StepName]
    for step in steps or []:
        if step not in known:
            raise fail(f"there is no step {step!r}: use {', '.join(known)}", 2)
    uvloop.run(work(Settings(), [StepName(step) for step in steps or known]))


def serve(*, service: Annotated[Service, typer.Argument(help="Which service.")]) -> None:
    r"""Run a service in this process, with the settings of the environment.

    \b
    Examples:
      freshline serve ingest
      FRESHLINE_QUERY__PORT=8090 freshline serve query
    """
    import uvloop  # noqa: PLC0415 - heavy

    from infra.settings import Settings  # noqa: PLC0415 - as above

    if service is Service.INGEST:
        from ingest.main import serve as run  # noqa: PLC0415 - as above
    else:
        from query.main import serve as run  # noqa: PLC0415 - as above
    uvloop.run(run(Settings()))


def lag(*, as_json: Json = False) -> None:
    r"""Show how far each step is behind, in records.

    \b
    Examples:
      freshline lag
      freshline lag --json
    """
    figures = asyncio.run(_lag())
    if as_json:
        print_json(figures)
        return
    for step, behind in figures.items():
        out.print(f"{step:12} {behind:>10} behind")


def verify(
    *,
    repair: Annotated[bool, typer.Option("--repair", help="Remove orphans; send again what is missing.")] = False,
    as_json: Json = False,
) -> None:
    r"""Check that index, manifests, contents and the stream agree; exits with 1 when they do not.

    \b
    Examples:
      freshline verify
      freshline verify --repair --json
    """
    from freshline.installation import find  # noqa: PLC0415 - heavy
    from freshline.verify import verify as check  # noqa: PLC0415 - as above

    report = asyncio.run(check(find(), repair=repair))
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        out.print(f"{report.documents} documents, {report.chunks} passages, {report.tombstones} tombstones")
        for finding, examples in report.findings.items():
            out.print(f"{finding}: {len(examples)}, such as {', '.join(examples[:3])}", style="red", markup=False)
        out.print("all agree" if report.ok else "they do not agree", style="green" if report.ok else "red")
    if not report.ok:
        raise typer.Exit(1)


async def _lag() -> dict[str, int]:
    from freshline.installation import find  # noqa: PLC0415 - heavy
    from infra.kafka.provision import StreamAdmin  # noqa: PLC0415 - as above
    from streams.topology import TOPOLOGY  # noqa: PLC0415 - as above

    settings = find()
    async with StreamAdmin(settings) as admin:
        return {
            str(step): sum(one.behind for one in await admin.lag(row.reads, settings.names.group(step)))
            for step, row in TOPOLOGY.items()
        }
