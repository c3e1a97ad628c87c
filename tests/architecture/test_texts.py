"""Commands, options and link targets in the documentation exist."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer.main

from bench.cli import app as bench_app
from freshline.cli.app import app

ROOT = Path(__file__).parents[2]
TEXTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
COMMANDS = typer.main.get_command(app).commands
BENCHMARKS = typer.main.get_command(bench_app).commands
TARGETS = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands(name: str) -> set[str]:
    """All commands that start with the name, in code blocks and inline code."""
    found = set()
    for file in TEXTS:
        text = file.read_text(encoding="utf-8")
        blocks = re.findall(r"^```(?:sh|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        code = [*blocks, *re.findall(r"`([^`\n]+)`", text)]
        for line in (line for block in code for line in block.replace("\\\n", " ").splitlines()):
            for part in re.split(r";|&&|\|(?!\|)", line.partition(" #")[0]):
                words = re.sub(r"^([\s$]|[A-Z_]+=\S*\s)+", "", part)
                if words.startswith(f"{name} "):
                    found.add(words.strip())
    return found


@pytest.mark.parametrize("command", sorted(commands("make")))
def test_make_targets_exist(command):
    assert {word for word in shlex.split(command)[1:] if "=" not in word} <= TARGETS


@pytest.mark.parametrize("command", sorted(commands("freshline")))
def test_commands_and_their_options_exist(command):
    words = shlex.split(command)[1:]
    for name in words[0].split("|"):
        found = COMMANDS[name]
        if name == "bench" and len(words) > 1:
            found = BENCHMARKS[words[1]]
        elif len(words) > 1 and words[1] in (parts := getattr(found, "commands", {})):
            found = parts[words[1]]
        known = {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}
        used = {word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)}
        assert used <= known | {"--help"}, command


def test_the_readme_names_the_two_commands():
    assert {"make demo", "make test"} <= commands("make")


def test_every_make_target_has_help_and_is_phony():
    text = (ROOT / "Makefile").read_text()
    [phony] = re.findall(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    assert set(phony.split()) == TARGETS


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_links_resolve(file):
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", file.read_text(encoding="utf-8"))
    assert [link for link in links if not (file.parent / link).exists()] == []


def commands_with_help() -> list[tuple[str, click.Command]]:
    """Every command with its name, subcommands included."""
    found = [(name, command) for name, command in COMMANDS.items() if name != "bench"]
    parts = [(name, getattr(command, "commands", {})) for name, command in found]
    return found + [(f"{name} {part}", command) for name, commands in parts for part, command in commands.items()]


@pytest.mark.parametrize(("name", "command"), commands_with_help(), ids=[name for name, _ in commands_with_help()])
def test_help_prints_each_example_on_its_own_line(name: str, command: click.Command):
    shown = command.get_help(click.Context(command, info_name=f"freshline {name}"))
    assert re.findall(rf"^ *(?:[A-Z_]+=\S+ )?freshline {name}", shown, re.MULTILINE)
    assert "\\b" not in shown
