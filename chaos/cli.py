"""The ``chaos`` command."""

import asyncio
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from freshline.cli.terminal import FAILED, Json, add_command, err, out, print_json, stopped_like_ctrl_c

_COLUMNS: Final = ("times", "in_flight", "lost", "stale", "resurrected", "recovery_s", "failed_queries")


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(app, chaos)


def chaos(
    *,
    seed: Annotated[int | None, typer.Option(help="Seed of all faults and, without --events, of all events.")] = None,
    minutes: Annotated[
        float, typer.Option(min=0.1, help="Minutes of fault injection, without start and shutdown.")
    ] = 3.0,
    events: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Recorded history to send instead of generated events."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep data and logs, and print their directory.")] = False,
    as_json: Json = False,
) -> None:
    """Inject faults into a dedicated installation under load and check all guarantees. Exits with 1 on violation.

    The installation has three brokers, three OpenSearch nodes (one is voting-only), Redis, and two of each process.
    They are killed, paused, partitioned, restarted, run out of disk space and get wrong clocks. After each fault, all
    events must be processed within two minutes. Then an independent checker compares stream, index, answers and a
    reference model. Requires Go or toxiproxy-server, libfaketime, and about 9 GB of memory. All processes end with the
    command.

    Examples:
      freshline chaos
      freshline chaos --seed 7 --minutes 10 --json
      freshline chaos --events history.jsonl.gz --keep
    """
    from chaos.run import run  # noqa: PLC0415 - heavy

    chosen = secrets.randbelow(1_000_000) if seed is None else seed
    err.print(f"seed {chosen}: `freshline chaos --seed {chosen} --minutes {minutes:g}` repeats these faults")
    # Readable for servers that run as another user, unlike a private temporary directory.
    home = Path(tempfile.mkdtemp(prefix="freshline-chaos-", dir="/var/tmp"))
    home.chmod(0o711)
    try:
        with stopped_like_ctrl_c():
            report = asyncio.run(run(home, seed=chosen, minutes=minutes, events=events, say=_say))
        keep |= not report["ok"]
    except Exception:
        keep = True
        raise
    finally:
        if keep:
            err.print(f"data and logs are in {home}")
        else:
            shutil.rmtree(home)
    _show(report, as_json=as_json)
    if not report["ok"]:
        raise typer.Exit(FAILED)


def _say(what: str, state: str) -> None:
    err.print(f"{what}: {state}")


def _show(report: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    out.print(f"{'fault':28}" + "".join(f"{name.replace('_', ' '):>16}" for name in _COLUMNS))
    for name, row in report["by_fault"].items():
        out.print(f"{name:28}" + "".join(f"{row[column]:>16}" for column in _COLUMNS))
    out.print(f"{report['events']} events: {report['outcomes']}; {report['queries']} questions")
    for reason, count in report["failure_reasons"].items():
        out.print(f"{count} questions failed: {reason}")
    for kind, reason in report["unsupported_faults"].items():
        out.print(f"{kind} is not supported here: {reason}", style="yellow")
    for line in (*report["not_recovered"], *report["violations"]):
        out.print(line, style="red")
    out.print(
        "all guarantees held" if report["ok"] else "guarantees were violated",
        style="green" if report["ok"] else "red",
    )
