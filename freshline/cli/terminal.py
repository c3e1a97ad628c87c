"""What the commands say, where, and how they fail."""

import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import orjson
import typer
from rich.console import Console

FAILED: Final = 1
MISUSED: Final = 2
UNFINISHED: Final = 3
INCOMPLETE: Final = 4
INTERRUPTED: Final = 130
"""Exit codes: the usual ones, and two for work that did not fail: it had not ended in time, or left something out."""

_OURS: Final = frozenset({"freshline", "ingest", "query", "streams", "infra", "schemas"})

out = Console(highlight=False, soft_wrap=True, markup=False)
"""Results."""
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
"""Progress and errors, so that results can be piped."""

Json = Annotated[bool, typer.Option("--json", help="One line of JSON, last on standard output.")]
Data = Annotated[
    Path | None, typer.Option("--data", help="Data directory of the local installation; by default the user's.")
]


def add_command(app: typer.Typer, command: Callable[..., None], **options: Any) -> None:
    """Add a command whose docstring ends with a section ``Examples:``, the lines of which stay lines in its help."""
    about, _, examples = (inspect.getdoc(command) or "").partition("\nExamples:\n")
    # A backspace alone on a line keeps the paragraph after it from being filled.
    app.command(help=f"{about}\n\b\nExamples:\n{examples}", **options)(command)


def print_json(figures: Mapping[str, Any]) -> None:
    """One line of JSON on standard output."""
    sys.stdout.write(orjson.dumps(figures, option=orjson.OPT_NON_STR_KEYS).decode() + "\n")
    sys.stdout.flush()


def fail(message: str, code: int = FAILED) -> typer.Exit:
    """Say what is wrong; raise what this returns."""
    err.print(f"error: {message}", style="red")
    return typer.Exit(code)


def explain(error: BaseException) -> str:
    """What an error says to a person. Our own messages stand for themselves; others need the name of their type."""
    from pydantic import ValidationError  # noqa: PLC0415 - heavy

    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ValidationError):
        # Without the value: it may be a secret in a wrong place.
        problems = error.errors(include_url=False, include_input=False)
        return "; ".join(f"FRESHLINE_{'__'.join(map(str, one['loc'])).upper()}: {one['msg']}" for one in problems)
    text = str(error)
    if text and type(error).__module__.partition(".")[0] in _OURS:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def stopped_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command as Ctrl-C does: in order."""

    def interrupt(_number: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    # One that is ignored stays so: that is what nohup is for.
    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get("FRESHLINE_LOG_LEVEL", "").lower() == "debug"
