"""What the commands say, where, and how they fail."""

import sys
from collections.abc import Mapping
from typing import Any

import orjson
import typer
from rich.console import Console

out = Console(highlight=False, soft_wrap=True)
"""Results."""
err = Console(stderr=True, highlight=False, soft_wrap=True)
"""Progress and errors, so that results can be piped."""


def print_json(figures: Mapping[str, Any]) -> None:
    """One line of JSON on standard output."""
    sys.stdout.write(orjson.dumps(figures, option=orjson.OPT_NON_STR_KEYS).decode() + "\n")
    sys.stdout.flush()


def fail(message: str, code: int = 1) -> typer.Exit:
    """Say what is wrong; raise what this returns."""
    err.print(f"error: {message}", style="red", markup=False)
    return typer.Exit(code)
