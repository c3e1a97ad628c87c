"""Command line reference, generated from the commands' own ``--help`` texts."""

import importlib
import re
from collections.abc import Iterator
from typing import Any, Final

import typer
import typer.main

from freshline.cli.app import app

_ABOUT: Final = """# Command line

<!-- Generated from the commands' --help texts by `make schemas`; edit those. -->

Exit codes: 0 success, 1 failure, 2 usage error, 130 interrupted. `bench` and `chaos` exist in a checkout only, not in
the installed package. Options that accept several values are repeated.
"""

_MARKUP: Final = re.compile(r"([|<>])")
"""To be escaped in a cell of a Markdown table."""


def cli_reference() -> str:
    """The reference as Markdown. Depends on the code alone."""
    bench = importlib.import_module("bench.cli").app
    sections = [_ABOUT, *_sections(app, "freshline", skipped=("bench",)), *_sections(bench, "freshline bench")]
    return "\n".join(sections)


def _sections(commands: typer.Typer, prefix: str, *, skipped: tuple[str, ...] = ()) -> Iterator[str]:
    group: Any = typer.main.get_command(commands)
    for name, command in sorted(group.commands.items()):
        if name in skipped:
            continue
        members = getattr(command, "commands", None)
        if members is None:
            yield _section(command, f"{prefix} {name}")
        else:
            for member, subcommand in sorted(members.items()):
                yield _section(subcommand, f"{prefix} {name} {member}")


def _section(command: Any, name: str) -> str:
    about, _, examples = (command.help or "").partition("\n\b\nExamples:\n")
    context = typer.Context(command)
    rows, usage = [], [name, "[OPTIONS]"]
    for parameter in command.params:
        names, meaning = parameter.get_help_record(context) or ("", "")
        if parameter.param_type_name == "argument":
            names = " ".join(parameter.get_usage_pieces(context)).strip("{}").upper()
            usage.append(names)
        if names:
            escaped = names.replace("|", "\\|")
            rows.append(f"| `{escaped}` | {_escaped(' '.join(meaning.split()))} |")
    lines = [f"## {name}", "", about.strip(), "", "```sh", " ".join(usage), "```", ""]
    if rows:
        lines += ["| argument or option | meaning |", "|---|---|", *rows, ""]
    if examples:
        lines += ["Examples:", "", "```sh", *(line.strip() for line in examples.splitlines()), "```", ""]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return _MARKUP.sub(r"\\\1", text)
