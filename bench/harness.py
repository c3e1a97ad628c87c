"""Runs the measurement of a command on the local stack, reports progress, and prints the figures."""

import os
import platform
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
import uvloop
from rich.console import Console

from bench.installation import BenchmarkFailed
from bench.retrieval import MODELS
from freshline.cli.terminal import stopped_like_ctrl_c
from freshline.loadtest.questions import BadQuestionFile
from freshline.loadtest.wrk import WrkUnavailable
from freshline.services import ServiceFailed
from infra.local import Phase, Stack, StackConfig, StackError
from ingest.connectors.event_file import BadEventFile

_err = Console(stderr=True)

Events = Annotated[
    Path, typer.Option("--events", exists=True, dir_okay=False, help="Recorded history, .jsonl or .jsonl.gz.")
]
Questions = Annotated[
    Path,
    typer.Option(exists=True, dir_okay=False, help="Questions: JSON Lines with `text`, or plain lines; also gzipped."),
]
Model = Annotated[str | None, typer.Option(help=f"Embedding model instead of the default: {', '.join(MODELS)}.")]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON, last on standard output.")]
Data = Annotated[Path | None, typer.Option(help="Data directory of the local stack.")]
Figures = Mapping[str, object]


def overrides(model: str | None) -> dict[str, str]:
    """Settings of the requested model."""
    return {} if model is None else {"FRESHLINE_EMBEDDING__MODEL": model}


def measure(
    run: Callable[[Stack], Awaitable[Figures | Sequence[Figures]]], data: Path | None, *, as_json: bool
) -> None:
    """Run a measurement on the local stack and print its figures. Exits with 1 if it fails."""
    try:
        with stopped_like_ctrl_c(), _running(data) as stack:
            figures = uvloop.run(_awaited(run(stack)))
    except (BadEventFile, BadQuestionFile, BenchmarkFailed, WrkUnavailable, ServiceFailed, StackError) as error:
        _err.print(f"error: {error}", markup=False, highlight=False)
        raise typer.Exit(1) from None
    option = 0 if as_json else orjson.OPT_INDENT_2
    for one in [figures] if isinstance(figures, Mapping) else figures:
        sys.stdout.write(orjson.dumps({**_machine(), **one}, option=option).decode() + "\n")


async def _awaited(run: Awaitable[Figures | Sequence[Figures]]) -> Figures | Sequence[Figures]:
    return await run


@contextmanager
def _running(data: Path | None) -> Iterator[Stack]:
    """The local stack. If it is not running, it is started for the duration of the context."""
    stack = Stack.open(StackConfig() if data is None else StackConfig(data_dir=data))
    started = stack.status().state is not Phase.READY
    if started:
        stack.up(detach=True, say=say)
    try:
        yield stack
    finally:
        if started:
            stack.down()


def say(what: str, state: str) -> None:
    """Report progress."""
    _err.print(f"{what}: {state}", markup=False, highlight=False)


def _machine() -> dict[str, Any]:
    """The machine. The load generator and all servers share its cores."""
    return {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
