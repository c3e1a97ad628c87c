"""``up``, ``down``, ``status`` and ``demo``: the local installation."""

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from freshline.cli.terminal import (
    INTERRUPTED,
    MISUSED,
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
    from infra.local import Stack, StackStatus
    from infra.settings import Settings

_POLL_S: Final = 0.5


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_command(app, up)
    add_command(app, down)
    add_command(app, status)
    add_command(app, demo)


def up(
    *,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when ready; the installation keeps running.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the data directory first.")] = False,
    servers_only: Annotated[
        bool, typer.Option("--servers-only", help="Start Kafka, OpenSearch and Redis only.")
    ] = False,
    nodes: Annotated[
        int,
        typer.Option(help="1, or 3 for fault tests: 3 brokers and 3 OpenSearch nodes, one of them voting-only."),
    ] = 1,
    port: Annotated[
        list[str] | None, typer.Option(help="NAME=PORT for ingest, query, kafka-1, opensearch-1, redis … Repeatable.")
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Start Kafka, OpenSearch, Redis and Freshline on this machine, and wait until they are ready.

    Idempotent. Ctrl-C stops everything, unless it was started with --detach. All processes listen on the loopback
    interface only. Requests need the API key in the data directory, which the commands use.

    Examples:
      freshline up
      freshline up --detach --port query=8090
      freshline up --fresh --servers-only
      freshline up --nodes 3 --data /var/tmp/faults
    """
    from freshline.installation import await_workers, find, is_up, plan, save  # noqa: PLC0415 - heavy
    from infra.local import Phase, Stack  # noqa: PLC0415 - as above
    from infra.local.progress import shown  # noqa: PLC0415 - as above

    if nodes not in {1, 3}:
        raise fail(f"--nodes is 1 or 3, not {nodes}", MISUSED)
    config, installation = plan(data, nodes=nodes, ports=_ports(port or []), servers_only=servers_only)
    stack = Stack.open(config)
    running = is_up(stack)
    if not running:
        save(config.data_dir, installation)
    with stopped_like_ctrl_c():
        try:
            with shown() as say:
                stack.up(detach=detach, fresh=fresh, say=say)
                settings = find(config.data_dir)
                if servers_only:
                    asyncio.run(_provision(settings))
                else:
                    say("workers", "joining")
                    asyncio.run(await_workers(settings, stack))
                    say("workers", Phase.READY)
            _show(stack.status(), config.data_dir, as_json=as_json)
            _print_console_url(settings, is_served=not servers_only)
            if detach or running:
                return
            err.print("Press Ctrl-C to stop.")
            ended = supervise(stack)
        except KeyboardInterrupt:
            err.print("stopping …")
            if not running:
                stack.down()
            raise typer.Exit(INTERRUPTED) from None
        except BaseException:
            if not running:  # a failed start leaves no processes running, detached or not
                stack.down()
            raise
    if ended.state is not Phase.STOPPED:
        raise fail(ended.error or f"the installation ended in state {ended.state}")


def down(*, data: Data = None) -> None:
    """Stop the local installation and all its processes. Its data is kept.

    Examples:
      freshline down
      freshline down --data /var/tmp/faults
    """
    from infra.local import Phase, Stack, StackConfig  # noqa: PLC0415 - heavy

    stack = Stack.open(StackConfig() if data is None else StackConfig(data_dir=data))
    state_before = stack.status().state
    stack.down()
    err.print("nothing was running" if state_before is Phase.STOPPED else "stopped")


def status(*, data: Data = None, as_json: Json = False) -> None:
    """Show the state of the processes; exits with 1 if the installation is not ready.

    Examples:
      freshline status
      freshline status --data /var/tmp/faults --json
    """
    from infra.local import Phase, Stack, StackConfig  # noqa: PLC0415 - heavy

    stack = Stack.open(StackConfig() if data is None else StackConfig(data_dir=data))
    current = stack.status()
    _show(current, stack.config.data_dir, as_json=as_json)
    failed = any(process.state is Phase.FAILED for process in current.processes)
    if current.state is not Phase.READY or failed:
        raise typer.Exit(1)


def demo(
    *,
    docs: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Ingest this directory instead.")
    ] = None,
    git: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Ingest this git repository instead.")
    ] = None,
    events: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Ingest this event file instead.")
    ] = None,
    question: Annotated[list[str] | None, typer.Option(help="Ask this question instead. Repeatable.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Exit after the tour instead of serving.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Run a tour on real servers: ingest documents, ask, edit one and delete one, with times.

    By default it ingests the documentation of the running Python. It uses a data directory of its own, starts empty
    each time and does not affect other installations.

    Examples:
      freshline demo
      freshline demo --docs ./handbook --question "How do I ask for leave?"
      freshline demo --once --json
    """
    from freshline.demo.corpus import Sources  # noqa: PLC0415 - heavy
    from freshline.demo.run import run_demo  # noqa: PLC0415 - as above

    if sum(source is not None for source in (docs, git, events)) > 1:
        raise fail("choose one of --docs, --git and --events", MISUSED)
    with stopped_like_ctrl_c():
        sources = Sources(docs, git, events)
        run_demo(sources, questions=tuple(question or ()), once=once, data_dir=data, as_json=as_json)


def _ports(options: list[str]) -> dict[str, int]:
    ports = {}
    for option in options:
        name, _, number = option.partition("=")
        if not number.isdecimal() or not 0 < int(number) < 65_536:  # noqa: PLR2004 - the range of ports
            raise fail(f"--port takes NAME=PORT, such as query=8090, not {option!r}", MISUSED)
        ports[name] = int(number)
    return ports


async def _provision(settings: "Settings") -> None:
    """Create the topics and indices that workers would create when they start."""
    from infra.kafka.provision import StreamAdmin  # noqa: PLC0415 - heavy
    from infra.opensearch.provision import create_indices  # noqa: PLC0415 - as above

    async with StreamAdmin(settings) as admin:
        await admin.create_topics()
    await create_indices(settings)


def supervise(stack: "Stack") -> "StackStatus":
    """Print each crash until the installation has ended; returns its final status."""
    from infra.local import Phase  # noqa: PLC0415 - heavy

    reported: dict[str, int] = {}
    while (current := stack.status()).state is Phase.READY:
        for process in current.processes:
            if process.crashes > reported.get(process.name, 0):
                reported[process.name] = process.crashes
                action = "not restarted" if process.state is Phase.FAILED else "restarting"
                err.print(f"{process.error}\n({action})", style="red")
        time.sleep(_POLL_S)
    return stack.wait()


def _print_console_url(settings: "Settings", *, is_served: bool) -> None:
    from freshline.services import console_url  # noqa: PLC0415 - heavy

    if is_served:
        err.print(f"console: {console_url(settings)}")


def _show(current: "StackStatus", data_dir: Path, *, as_json: bool) -> None:
    if as_json:
        print_json(current.model_dump(mode="json") | {"data_dir": str(data_dir)})
        return
    out.print(f"{current.state}  {data_dir}", style="bold")
    if current.error:
        out.print(current.error, style="red")
    for process in current.processes:
        memory = f"{process.rss_bytes / 1e6:.0f} MB" if process.rss_bytes is not None else "-"
        uptime = f"{process.uptime_s:.0f} s" if process.uptime_s is not None else "-"
        address = (process.address or "").removesuffix("/ready")
        line = f"  {process.name:14} {process.state:10} {process.pid or '-':>8} {memory:>9} {uptime:>9}  {address}"
        out.print(line.rstrip())
        if process.error:
            out.print(f"{process.error}\n({process.crashes} crashes since the start)", style="red")
