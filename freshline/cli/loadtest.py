"""``loadtest``: more and more users, until too much fails."""

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from freshline.cli.terminal import (
    FAILED,
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

if TYPE_CHECKING:  # heavy, and only there when a command has run
    from infra.settings import Settings

_STEPS: Final = "100,250,500,1000,2000,3500,5000"


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(app, loadtest)


def loadtest(
    *,
    questions: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, help="Questions: lines of JSON with text, or plain lines; .gz too."),
    ],
    events: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Recorded history whose edits are sent meanwhile."),
    ] = None,
    edits_per_s: Annotated[float, typer.Option(min=0.01, help="With --events: edits in a second.")] = 1.0,
    steps: Annotated[str, typer.Option(help="Users at a time, one number after the other.")] = _STEPS,
    think_s: Annotated[float, typer.Option(min=0, help="Mean seconds between an answer and the next question.")] = 10,
    step_s: Annotated[float, typer.Option(min=1, help="Seconds of each step.")] = 60,
    skew: Annotated[float, typer.Option(min=0, help="Zipf's s over the questions; 0 makes all equally frequent.")] = 1,
    report: Annotated[Path, typer.Option(file_okay=False, help="Directory for JSON, Markdown and the plot.")] = Path(
        "loadtest"
    ),
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Ask as more and more users of a running installation would, and write a report with a plot.

    It ends early where fewer than 95 % of the requests of a step succeed, and exits with 1. Only installations on this
    machine are loaded.

    Examples:
      freshline loadtest --questions questions.jsonl
      freshline loadtest --questions questions.txt --events history.jsonl.gz --steps 100,1000 --step-s 30
      freshline loadtest --questions questions.txt --think-s 0 --steps 16,64 --report /var/tmp/load --json
    """
    import uvloop  # noqa: PLC0415 - heavy

    from freshline.installation import find  # noqa: PLC0415 - as above

    crowds = _numbers(steps)
    settings = find(data)
    with stopped_like_ctrl_c():
        figures = uvloop.run(
            _load(
                settings,
                questions,
                events,
                crowds,
                edits_per_s=edits_per_s,
                think_s=think_s,
                step_s=step_s,
                skew=skew,
            )
        )
    _write(report, figures, as_json=as_json)
    if figures["stopped"]:
        raise typer.Exit(FAILED)


def _numbers(steps: str) -> list[int]:
    numbers = [one.strip() for one in steps.split(",")]
    if not all(one.isdecimal() and int(one) for one in numbers):
        raise fail(f"--steps takes numbers of users, such as {_STEPS}, not {steps!r}", MISUSED)
    return [int(one) for one in numbers]


def _write(report: Path, figures: dict[str, Any], *, as_json: bool) -> None:
    import orjson  # noqa: PLC0415 - heavy

    from freshline.loadtest.report import table, write_report  # noqa: PLC0415 - as above

    files = write_report(report, figures, orjson.dumps(figures, option=orjson.OPT_INDENT_2))
    err.print(f"written: {', '.join(map(str, files))}")
    if as_json:
        print_json(figures)
    else:
        out.print(table(figures["steps"]))
        if figures["stopped"]:
            out.print(f"ended early: {figures['stopped']}", style="red")


async def _load(
    settings: "Settings",
    questions: Path,
    events: Path | None,
    crowds: list[int],
    *,
    edits_per_s: float,
    think_s: float,
    step_s: float,
    skew: float,
) -> dict[str, Any]:
    from contextlib import AsyncExitStack  # noqa: PLC0415 - as below

    from freshline.loadtest.edits import Edits, history_of  # noqa: PLC0415 - heavy
    from freshline.loadtest.questions import Zipf, read_questions  # noqa: PLC0415 - as above
    from freshline.loadtest.run import LEAST_SUCCESS, Crowd, climb, editing, question_requests  # noqa: PLC0415 - as above
    from freshline.loadtest.tally import Ledger, Tally  # noqa: PLC0415 - as above
    from freshline.services import ingest_client, query_target  # noqa: PLC0415 - as above

    asked = await asyncio.to_thread(read_questions, questions)
    target = query_target(settings)
    ledger = Ledger()
    began_s = time.monotonic()

    def told(step: dict[str, Any]) -> None:
        err.print(
            f"{time.monotonic() - began_s:6.0f} s  {step['users']:>6,} users: {step['answers_per_s']}/s, mean "
            f"{step['mean_ms']} ms, p99 {step['p99_ms']} ms, success {step['success_share']}, hits {step['hit_share']}"
        )

    async with AsyncExitStack() as ending:
        edits = None
        if events is not None:
            client = await ending.enter_async_context(ingest_client(settings))
            edits = Edits(client, history_of(events), ledger, per_s=edits_per_s)
        await ending.enter_async_context(editing(edits))
        found = await climb(
            [Crowd(users, think_s, step_s) for users in crowds],
            target,
            Zipf(question_requests(target, asked), skew=skew, seed=1),
            new_tally=lambda: Tally(ledger),
            told=told,
        )
        sent = edits.figures() if edits is not None else {"edits": 0}
    last = found[-1]
    failing = (last["success_share"] or 0.0) < LEAST_SUCCESS
    return {
        "questions": len(asked),
        "skew": skew,
        "think_s": think_s,
        "step_s": step_s,
        "steps": found,
        **sent,
        "stopped": f"at {last['users']} users {last['success_share']:.1%} of the requests succeeded"
        if failing
        else None,
    }
