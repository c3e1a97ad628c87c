"""``worker``, ``serve``, ``lag`` and ``verify``: run the processes, and check them."""

import asyncio
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freshline.cli.terminal import FAILED, MISUSED, Data, Json, add_command, fail, out, print_json

if TYPE_CHECKING:  # heavy
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
    steps: Annotated[list[str] | None, typer.Argument(help="prepare, index, invalidate, notify. Default: all.")] = None,
    data: Data = None,
) -> None:
    """Run pipeline steps in this process until Ctrl-C or SIGTERM.

    Connects to the servers in the environment's settings, or to those of the local installation. The workers of a step
    share its partitions (one consumer group per step).

    Examples:
      freshline worker
      freshline worker prepare
      freshline worker index invalidate
      FRESHLINE_KAFKA__BOOTSTRAP_SERVERS=broker:9092 freshline worker index
    """
    import uvloop  # noqa: PLC0415 - heavy

    from freshline.installation import find  # noqa: PLC0415 - as above
    from streams.topology import StepName  # noqa: PLC0415 - as above

    names = [str(step) for step in StepName]
    for step in steps or []:
        if step not in names:
            raise fail(f"unknown step {step!r}: use {', '.join(names)}", MISUSED)
    from streams.worker import work  # noqa: PLC0415 - as above

    uvloop.run(work(find(data), [StepName(step) for step in dict.fromkeys(steps or names)]))


def serve(
    *,
    service: Annotated[Service, typer.Argument(help="Service to run.")],
    processes: Annotated[
        int, typer.Option(min=1, max=256, help="Query processes that share one address. SIGHUP replaces them.")
    ] = 1,
    data: Data = None,
) -> None:
    """Run a service until Ctrl-C or SIGTERM.

    Connects to the servers in the environment's settings, or to those of the local installation. With several
    processes, `/metrics` and `/health` describe the process that responds.

    Examples:
      freshline serve ingest
      FRESHLINE_QUERY__PORT=8090 freshline serve query
      freshline serve query --processes 4
    """
    import uvloop  # noqa: PLC0415 - heavy

    from freshline.installation import find  # noqa: PLC0415 - as above

    if service is Service.INGEST:
        if processes > 1:
            raise fail("--processes is an option of query only", MISUSED)
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
    """Show the consumer lag of each step in records, and whether the step has an active worker.

    Examples:
      freshline lag
      freshline lag --json
    """
    from freshline.installation import find  # noqa: PLC0415 - heavy

    figures = asyncio.run(_lag(find(data)))
    if as_json:
        print_json(figures)
        return
    for step, row in figures.items():
        lagging = {number: records for number, records in row["partitions"].items() if records}
        partitions = f"  partitions {', '.join(f'{number}: {records}' for number, records in lagging.items())}"
        workers = "active" if row["consumed"] else "no active worker, or a rebalance in progress"
        out.print(f"{step:12} lag {row['behind']:>10}, {workers}{partitions if lagging else ''}")


def verify(
    *,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Rewrite inconsistent documents, remove orphaned passages, and verify again."),
    ] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Verify that index, manifests and contents are consistent with the stream; exits with 1 if they are not.

    Every content is parsed and split again, and compared with the stored passages.

    Events in progress can be reported as inconsistencies. Run it when `freshline lag` shows no lag.

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
            f"{report.documents} documents, {report.tombstones} tombstones, {report.chunks} passages, "
            f"{report.events} events"
        )
        for kind, finding in report.findings.items():
            more = " …" if finding.count > len(finding.examples) else ""
            out.print(
                f"{kind.replace('_', ' ')}: {finding.count}, such as {', '.join(finding.examples[:3])}{more}",
                style="red",
            )
            out.print(f"  {finding.advice}", style="dim")
        if report.rejected.count:
            out.print(
                f"newest version rejected: {report.rejected.count}, such as {', '.join(report.rejected.examples[:3])}"
            )
            out.print(f"  {report.rejected.advice}", style="dim")
        if report.not_compared.count:
            out.print(
                f"passages not compared: {report.not_compared.count} documents, such as "
                f"{', '.join(report.not_compared.examples[:3])}"
            )
            out.print(f"  {report.not_compared.advice}", style="dim")
        if report.repaired:
            out.print(f"repaired: {', '.join(f'{action} {count}' for action, count in report.repaired.items())}")
        if report.in_progress:
            out.print(f"{report.in_progress} events are in progress: verify again when `freshline lag` shows no lag")
        out.print("consistent" if report.ok else "inconsistent", style="green" if report.ok else "red")
    if not report.ok:
        raise typer.Exit(FAILED)


async def _lag(settings: "Settings") -> dict[str, dict[str, Any]]:
    from infra.kafka.provision import StreamAdmin  # noqa: PLC0415 - heavy
    from streams.topology import TOPOLOGY  # noqa: PLC0415 - as above

    figures: dict[str, dict[str, Any]] = {}
    async with StreamAdmin(settings) as admin:
        for step, row in TOPOLOGY.items():
            group = settings.names.group(step)
            partitions = {lag.partition: lag.records for lag in await admin.lag(row.reads, group)}
            consumed = await admin.is_consumed(group)
            figures[str(step)] = {"behind": sum(partitions.values()), "consumed": consumed, "partitions": partitions}
    return figures
