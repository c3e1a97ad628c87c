"""Terminal output, exit codes and shared options of the commands."""

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
"""Exit codes. ``UNFINISHED``: a wait timed out. ``INCOMPLETE``: nothing failed, but some input was not indexed."""

_OWN_PACKAGES: Final = frozenset({"freshline", "ingest", "query", "streams", "infra", "schemas"})

out = Console(highlight=False, soft_wrap=True, markup=False)
"""Results."""
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
"""Progress and errors, so that results can be piped."""

Json = Annotated[
    bool, typer.Option("--json", help="Print the result as one line of JSON, the last line of standard output.")
]
Data = Annotated[
    Path | None, typer.Option("--data", help="Data directory of the local installation. Default: the user's.")
]


def add_command(app: typer.Typer, command: Callable[..., None], **options: Any) -> None:
    """Add a command. The lines of the ``Examples:`` section that ends its docstring are not rewrapped in its help."""
    about, _, examples = (inspect.getdoc(command) or "").partition("\nExamples:\n")
    # A line with a backspace alone disables rewrapping of the next paragraph.
    app.command(help=f"{about}\n\b\nExamples:\n{examples}", **options)(command)


def print_json(figures: Mapping[str, Any]) -> None:
    """Print one line of JSON on standard output."""
    sys.stdout.write(orjson.dumps(figures, option=orjson.OPT_NON_STR_KEYS).decode() + "\n")
    sys.stdout.flush()


def fail(message: str, code: int = FAILED) -> typer.Exit:
    """Print an error; returns the exception for the caller to raise."""
    err.print(f"error: {message}", style="red")
    return typer.Exit(code)


def explain(error: BaseException) -> str:
    """Error message for a terminal. Errors of other packages are prefixed with their type."""
    from pydantic import ValidationError  # noqa: PLC0415 - heavy

    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ValidationError):
        # Without the value: it may be a misplaced secret.
        problems = error.errors(include_url=False, include_input=False)
        return "; ".join(
            f"FRESHLINE_{'__'.join(map(str, problem['loc'])).upper()}: {problem['msg']}" for problem in problems
        )
    text = str(error)
    if text and type(error).__module__.partition(".")[0] in _OWN_PACKAGES:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def stopped_like_ctrl_c() -> Iterator[None]:
    """Handle SIGTERM and SIGHUP like Ctrl-C: shut down gracefully."""

    def interrupt(_number: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    # An ignored signal stays ignored, for nohup.
    handled = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def debugging() -> bool:
    """Whether to print tracebacks."""
    return os.environ.get("FRESHLINE_LOG_LEVEL", "").lower() == "debug"
