"""``up``, ``down``, ``status`` and ``demo``."""

from pathlib import Path
from typing import Annotated

import typer

from freshline.terminal import err, fail, out, print_json

Data = Annotated[Path | None, typer.Option("--data", help="Data directory; by default one for each user.")]
Json = Annotated[bool, typer.Option("--json", help="One line of JSON, last on standard output.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(up)
    app.command()(down)
    app.command()(status)
    app.command()(demo)


def up(
    *,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when ready and leave it running.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin with an empty data directory.")] = False,
    servers_only: Annotated[bool, typer.Option("--servers-only", help="Kafka, OpenSearch and Redis alone.")] = False,
    nodes: Annotated[int, typer.Option(help="1, or 3 brokers and 2 OpenSearch nodes for fault tests.")] = 1,
    port: Annotated[
        list[str] | None, typer.Option(help="NAME=PORT for kafka-1, opensearch-1, redis, ingest, query.")
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    r"""Start Kafka, OpenSearch, Redis and Freshline on this machine, and wait until they are ready.

    Running it again is harmless. Ctrl-C ends everything, unless it was started with --detach.

    \b
    Examples:
      freshline up
      freshline up --detach --port query=8090
      freshline up --nodes 3 --data /var/tmp/faults
    """
    from freshline.installation import plan, remember  # noqa: PLC0415 - heavy
    from infra.local import Phase, Stack, StackError  # noqa: PLC0415 - as above
    from infra.local.progress import shown  # noqa: PLC0415 - as above

    if nodes not in {1, 3}:
        raise fail(f"--nodes is 1 or 3, not {nodes}", 2)
    config, installation = plan(data, nodes=nodes, ports=_ports(port or []), fresh=fresh)
    if servers_only:
        config = config.model_copy(update={"apps": ()})
    stack = Stack.open(config)
    running = stack.status().state is Phase.READY
    try:
        with shown() as say:
            stack.up(detach=detach, fresh=fresh, say=say)
        if not running:
            remember(config.data_dir, installation)
        _show_status(data, as_json=as_json)
        if detach or running:
            return
        err.print("Ctrl-C ends it.")
        ended = stack.wait()
    except StackError as error:
        raise fail(str(error)) from None
    except KeyboardInterrupt:
        err.print("stopping …")
        stack.down()
        raise typer.Exit(130) from None
    if ended.state is not Phase.STOPPED:
        raise fail(ended.error or f"it ended as {ended.state}")


def down(*, data: Data = None) -> None:
    r"""End the local installation and everything it started; its data stays.

    \b
    Examples:
      freshline down
      freshline down --data /var/tmp/faults
    """
    from infra.local import Stack, StackConfig  # noqa: PLC0415 - heavy

    Stack.open(StackConfig() if data is None else StackConfig(data_dir=data)).down()
    err.print("stopped")


def status(*, data: Data = None, as_json: Json = False) -> None:
    r"""Show what runs; exits with 1 when it is not ready.

    \b
    Examples:
      freshline status
      freshline status --json
    """
    if not _show_status(data, as_json=as_json):
        raise typer.Exit(1)


def demo(
    *,
    docs: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Ingest this directory instead.")
    ] = None,
    git: Annotated[Path | None, typer.Option(exists=True, help="Ingest this git repository instead.")] = None,
    events: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Ingest this event file instead.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="End after the tour instead of serving.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    r"""Show everything on real servers: ingest documents, ask, edit one, delete one, with times.

    \b
    Examples:
      freshline demo
      freshline demo --docs ./handbook
      freshline demo --once --json
    """
    from freshline.demo import run_demo  # noqa: PLC0415 - heavy
    from infra.local import StackError  # noqa: PLC0415 - as above

    try:
        run_demo(docs=docs, git=git, events=events, once=once, data_dir=data, as_json=as_json)
    except StackError as error:
        raise fail(str(error)) from None


def _ports(told: list[str]) -> dict[str, int]:
    ports = {}
    for one in told:
        name, _, number = one.partition("=")
        if not number.isdigit():
            raise fail(f"--port takes NAME=PORT, such as query=8090, not {one!r}", 2)
        ports[name] = int(number)
    return ports


def _show_status(data: Path | None, *, as_json: bool) -> bool:
    from infra.local import Phase, Stack, StackConfig  # noqa: PLC0415 - heavy

    found = Stack.open(StackConfig() if data is None else StackConfig(data_dir=data)).status()
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        out.print(f"{found.state}{f': {found.error}' if found.error else ''}", markup=False)
        for process in found.processes:
            memory = f"{process.rss_bytes / 1e6:.0f} MB" if process.rss_bytes is not None else "-"
            line = (
                f"  {process.name:14} {process.state:10} {process.pid or '-':>8} {memory:>9}  {process.address or ''}"
            )
            out.print(line, markup=False)
            if process.error:
                out.print(process.error, markup=False)
    return found.state is Phase.READY
