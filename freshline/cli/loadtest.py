"""``loadtest``: ramp up simulated users until the success rate drops."""

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

if TYPE_CHECKING:  # heavy
    from infra.settings import Settings

_STEPS: Final = "100,250,500,1000,2000,3500,5000"


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(app, loadtest)


def loadtest(
    *,
    questions: Annotated[
        Path,
        typer.Option(
            exists=True, dir_okay=False, help="Questions: JSON lines with `text`, or plain lines; optionally .gz."
        ),
    ],
    events: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Recorded history; its edits are sent during the test."),
    ] = None,
    edits_per_s: Annotated[float, typer.Option(min=0.01, help="With --events: edits per second.")] = 1.0,
    steps: Annotated[str, typer.Option(help="Concurrent users of each step.")] = _STEPS,
    think_s: Annotated[float, typer.Option(min=0, help="Mean think time in seconds.")] = 10,
    step_s: Annotated[float, typer.Option(min=1, help="Duration of a step in seconds.")] = 60,
    skew: Annotated[float, typer.Option(min=0, help="Zipf exponent of the question frequencies; 0 is uniform.")] = 1,
    report: Annotated[Path, typer.Option(file_okay=False, help="Directory for JSON, Markdown and the plot.")] = Path(
        "loadtest"
    ),
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Run a load test with increasing numbers of users, and write a report with a plot.

    Stops and exits with 1 after a step in which fewer than 95 % of the requests succeed. Only installations on this
    machine can be tested.

    Examples:
      freshline loadtest --questions questions.jsonl
      freshline loadtest --questions questions.txt --events history.jsonl.gz --steps 100,1000 --step-s 30
      freshline loadtest --questions questions.txt --think-s 0 --steps 16,64 --report /var/tmp/load --json
    """
    import uvloop  # noqa: PLC0415 - heavy

    from freshline.installation import find  # noqa: PLC0415 - as above

    loads = _numbers(steps)
    settings = find(data)
    with stopped_like_ctrl_c():
        figures = uvloop.run(
            _load(
                settings,
                questions,
                events,
                loads,
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
    numbers = [number.strip() for number in steps.split(",")]
    if not all(number.isdecimal() and int(number) for number in numbers):
        raise fail(f"--steps takes numbers of users, such as {_STEPS}, not {steps!r}", MISUSED)
    return [int(number) for number in numbers]


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
            out.print(f"stopped early: {figures['stopped']}", style="red")


async def _load(
    settings: "Settings",
    questions: Path,
    events: Path | None,
    loads: list[int],
    *,
    edits_per_s: float,
    think_s: float,
    step_s: float,
    skew: float,
) -> dict[str, Any]:
    from contextlib import AsyncExitStack  # noqa: PLC0415 - as below

    from freshline.loadtest.edits import EditSender, history_of  # noqa: PLC0415 - heavy
    from freshline.loadtest.load_statistics import FreshnessSlo, LoadStatistics  # noqa: PLC0415 - as above
    from freshline.loadtest.questions import Zipf, read_questions  # noqa: PLC0415 - as above
    from freshline.loadtest.run import MIN_SUCCESS_RATE, UserLoad, editing, question_requests, run_steps  # noqa: PLC0415 - as above
    from freshline.services import ingest_client, query_target  # noqa: PLC0415 - as above

    texts = await asyncio.to_thread(read_questions, questions)
    target = query_target(settings)
    slo = FreshnessSlo()
    started_s = time.monotonic()

    def on_step(step: dict[str, Any]) -> None:
        err.print(
            f"{time.monotonic() - started_s:6.0f} s  {step['users']:>6,} users: {step['answers_per_s']}/s, mean "
            f"{step['mean_ms']} ms, p99 {step['p99_ms']} ms, success {step['success_rate']}, hits {step['hit_rate']}"
        )

    async with AsyncExitStack() as exit_stack:
        edits = None
        if events is not None:
            client = await exit_stack.enter_async_context(ingest_client(settings))
            edits = EditSender(client, history_of(events), slo, per_s=edits_per_s)
        await exit_stack.enter_async_context(editing(edits))
        results = await run_steps(
            [UserLoad(users, think_s, step_s) for users in loads],
            target,
            Zipf(question_requests(target, texts), skew=skew, seed=1),
            new_statistics=lambda: LoadStatistics(slo),
            on_step=on_step,
        )
        sent = edits.figures() if edits is not None else {"edits": 0}
    last = results[-1]
    failing = (last["success_rate"] or 0.0) < MIN_SUCCESS_RATE
    return {
        "questions": len(texts),
        "skew": skew,
        "think_s": think_s,
        "step_s": step_s,
        "steps": results,
        **sent,
        "stopped": f"at {last['users']} users {last['success_rate']:.1%} of the requests succeeded"
        if failing
        else None,
    }
