"""``chaos``: faults on real processes, and whether every promise held."""

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
    seed: Annotated[int | None, typer.Option(help="Decides all faults and, unless --events, all events.")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="How long faults come; start and end take some more.")] = 3.0,
    events: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Send this recorded history instead.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave data and logs, and say where.")] = False,
    as_json: Json = False,
) -> None:
    """Put an installation of its own under faults, with events and questions all the time; exits with 1 on any harm.

    Three brokers, three OpenSearch nodes (one only votes), Redis and two of each process: killed, paused, cut off from
    each other, restarted, out of disk, with wrong clocks. After each fault everything must end within two minutes, and
    an independent judge compares stream, index, answers and a model. Needs Go or toxiproxy-server, and libfaketime;
    about 9 GB of memory. No process is left behind.

    Examples:
      freshline chaos
      freshline chaos --seed 7 --minutes 10 --json
      freshline chaos --events history.jsonl.gz --keep
    """
    from chaos.run import run  # noqa: PLC0415 - heavy

    chosen = secrets.randbelow(1_000_000) if seed is None else seed
    err.print(f"seed {chosen}: `freshline chaos --seed {chosen} --minutes {minutes:g}` makes the same faults again")
    # Servers of another user must reach it, which a private temporary directory would not let them.
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
    for reason, count in report["failed_because"].items():
        out.print(f"{count} questions were not answered: {reason}")
    for kind, reason in report["not_possible_here"].items():
        out.print(f"{kind} is not possible here: {reason}", style="yellow")
    for line in (*report["not_recovered"], *report["violations"]):
        out.print(line, style="red")
    out.print(
        "every promise held" if report["ok"] else "promises were broken", style="green" if report["ok"] else "red"
    )
