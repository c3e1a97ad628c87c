"""``worker``, ``serve``, ``lag`` and ``verify``: the processes, and how they are doing."""

import asyncio
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freshline.cli.terminal import FAILED, MISUSED, Data, Json, add_command, fail, out, print_json

if TYPE_CHECKING:  # heavy, and only there when a command has run
    from infra.settings import Settings


class Service(StrEnum):
    """The HTTP services."""

    INGEST = "ingest"
    QUERY = "query"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_command(app, worker)
    add_command(app, serve)
    add_command(app, lag)
    add_command(app, verify)


def worker(
    *,
    steps: Annotated[list[str] | None, typer.Argument(help="prepare, index, invalidate, notify; all if none.")] = None,
    data: Data = None,
) -> None:
    """Run steps of the stream in this process, until Ctrl-C or SIGTERM.

    Its servers are those of the environment's settings, else those of the local installation. Several workers of one
    step share its partitions.

    Examples:
      freshline worker
      freshline worker prepare
      freshline worker index invalidate
      FRESHLINE_KAFKA__BOOTSTRAP_SERVERS=broker:9092 freshline worker index
    """
    import uvloop  # noqa: PLC0415 - heavy

    from freshline.installation import find  # noqa: PLC0415 - as above
    from streams.topology import StepName  # noqa: PLC0415 - as above

    known = [str(step) for step in StepName]
    for step in steps or []:
        if step not in known:
            raise fail(f"there is no step {step!r}: use {', '.join(known)}", MISUSED)
    from streams.worker import work  # noqa: PLC0415 - as above

    uvloop.run(work(find(data), [StepName(step) for step in dict.fromkeys(steps or known)]))


def serve(
    *,
    service: Annotated[Service, typer.Argument(help="Which service.")],
    processes: Annotated[
        int, typer.Option(min=1, max=256, help="Processes of query behind one address; SIGHUP replaces them.")
    ] = 1,
    data: Data = None,
) -> None:
    """Run a service, until Ctrl-C or SIGTERM.

    Its servers are those of the environment's settings, else those of the local installation. With several processes,
    `/metrics`, `/health` and `/performance-summary` tell of the one that answers.

    Examples:
      freshline serve ingest
      FRESHLINE_QUERY__PORT=8090 freshline serve query
      freshline serve query --processes 4
    """
    import uvloop  # noqa: PLC0415 - heavy

    from freshline.installation import find  # noqa: PLC0415 - as above

    if service is Service.INGEST:
        if processes > 1:
            raise fail("--processes goes with query", MISUSED)
        from ingest.main import serve as run  # noqa: PLC0415 - as above
    elif processes > 1:
        from freshline.replicas import serve_replicas  # noqa: PLC0415 - as above

        options = () if data is None else ("--data", str(data))
        uvloop.run(serve_replicas(find(data), processes, options=options))
        return
    else:
        from query.main import serve as run  # noqa: PLC0415 - as above
    uvloop.run(run(find(data)))


def lag(*, data: Data = None, as_json: Json = False) -> None:
    """Show how far each step is behind, in records, and whether a worker is there.

    Examples:
      freshline lag
      freshline lag --json
    """
    from freshline.installation import find  # noqa: PLC0415 - heavy

    figures = asyncio.run(_lag(find(data)))
    if as_json:
        print_json(figures)
        return
    for step, one in figures.items():
        behind = {number: records for number, records in one["partitions"].items() if records}
        where = f"  partitions {', '.join(f'{number}: {records}' for number, records in behind.items())}"
        who = "worked on" if one["consumed"] else "no worker, or a change of workers under way"
        out.print(f"{step:12} {one['behind']:>10} behind, {who}{where if behind else ''}")


def verify(
    *,
    repair: Annotated[
        bool, typer.Option("--repair", help="Have what disagrees written anew, remove orphaned passages, look again.")
    ] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Check that index, manifests, contents and the stream agree; exits with 1 when they do not.

    Every content is parsed and split again, and compared with what is stored of each passage.

    Events still under way would look like disagreements: it says so, and when `freshline lag` shows none is the time
    to ask.

    Examples:
      freshline verify
      freshline verify --repair --json
    """
    from freshline.installation import find  # noqa: PLC0415 - heavy
    from freshline.verify.run import verify as check  # noqa: PLC0415 - as above

    report = asyncio.run(check(find(data), repair=repair))
    if as_json:
        print_json(report.model_dump(mode="json") | {"ok": report.ok})
    else:
        out.print(
            f"{report.documents} documents, {report.tombstones} deleted ones, {report.chunks} passages, "
            f"{report.events} events"
        )
        for kind, found in report.findings.items():
            more = " …" if found.count > len(found.examples) else ""
            out.print(f"{kind}: {found.count}, such as {', '.join(found.examples[:3])}{more}", style="red")
            out.print(f"  {found.advice}", style="dim")
        if report.refused.count:
            out.print(
                f"newest version refused: {report.refused.count}, such as {', '.join(report.refused.examples[:3])}"
            )
            out.print(f"  {report.refused.advice}", style="dim")
        if report.not_compared.count:
            out.print(
                f"passages not compared: {report.not_compared.count} documents, such as "
                f"{', '.join(report.not_compared.examples[:3])}"
            )
            out.print(f"  {report.not_compared.advice}", style="dim")
        if report.repaired:
            out.print(f"repaired: {', '.join(f'{what} {count}' for what, count in report.repaired.items())}")
        if report.under_way:
            out.print(f"{report.under_way} events are under way: look again when `freshline lag` shows none")
        out.print("all agree" if report.ok else "they do not agree", style="green" if report.ok else "red")
    if not report.ok:
        raise typer.Exit(FAILED)


async def _lag(settings: "Settings") -> dict[str, dict[str, Any]]:
    from infra.kafka.provision import StreamAdmin  # noqa: PLC0415 - heavy
    from streams.topology import TOPOLOGY  # noqa: PLC0415 - as above

    figures: dict[str, dict[str, Any]] = {}
    async with StreamAdmin(settings) as admin:
        for step, row in TOPOLOGY.items():
            group = settings.names.group(step)
            partitions = {one.partition: one.behind for one in await admin.lag(row.reads, group)}
            consumed = await admin.is_consumed(group)
            figures[str(step)] = {"behind": sum(partitions.values()), "consumed": consumed, "partitions": partitions}
    return figures
