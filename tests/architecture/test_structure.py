"""Rules of the project: lint, types, imports, sizes, and settings and commands with descriptions."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from freshline.cli.app import app
from freshline.contracts import main as compare_contracts
from infra.settings import Section, Settings

ROOT = Path(__file__).parents[2]
PACKAGES = ("freshline", "ingest", "query", "streams", "schemas", "infra", "bench", "chaos")
SOURCES = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_top_level_packages_are_those_of_the_project(package):
    # Generic names could be taken by another distribution in the same environment.
    assert Path(importlib.import_module(package).__file__).parent == ROOT / package


def test_lint():
    run("ruff", "check", ".")


def test_format():
    run("ruff", "format", "--check", ".")


def test_types():
    run("mypy")


def test_import_rules():
    lint_imports = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint_imports], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_only_one_module_imports_faust():
    importing = [
        file.relative_to(ROOT).as_posix()
        for file in SOURCES
        if any(name.split(".")[0] in {"faust", "mode"} for name in imported(file))
    ]
    assert importing == ["streams/faust_app.py"]


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def test_modules_have_at_most_450_lines():
    long = {str(file.relative_to(ROOT)): n for file in SOURCES if (n := len(file.read_text().splitlines())) > 450}
    assert long == {}


LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}


def test_loggers_have_one_name_and_log_events_are_identifiers():
    offences, events = [], 0
    for file in SOURCES:
        place = file.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case (
                    ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=ast.Attribute(attr="get_logger")))
                    | ast.AnnAssign(target=ast.Name(id=name), value=ast.Call(func=ast.Attribute(attr="get_logger")))
                ) if name != "_log":
                    offences.append(f"{place}:{node.lineno}: logger {name}")
                case ast.Call(func=ast.Attribute(value=ast.Name(id="_log"), attr=level), args=[event, *_]) if (
                    level in LEVELS
                ):
                    events += 1
                    text = event.value if isinstance(event, ast.Constant) else None
                    if text is None or not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", text):
                        offences.append(f"{place}:{node.lineno}: event {ast.unparse(event)}")
    assert events > 30
    assert offences == []


def test_generated_contracts_and_configuration_are_current(capsys):
    assert compare_contracts(["--check"]) == 0, capsys.readouterr().err


def test_every_setting_has_a_description():
    sections = [one.annotation for one in Settings.model_fields.values() if isinstance(one.annotation, type)]
    fields = [
        (section.__name__, name, field)
        for section in sections
        if issubclass(section, Section)
        for name, field in section.model_fields.items()
    ]
    assert len(fields) > 40
    assert [(section, name) for section, name, field in fields if not field.description] == []


def commands() -> list[tuple[str, str]]:
    group = typer.main.get_command(app)
    return [(name, command.help or "") for name, command in group.commands.items()]


@pytest.mark.parametrize(("name", "text"), commands(), ids=lambda value: value if len(value) < 12 else "")
def test_every_command_has_examples(name, text):
    assert "Examples:" in text
    assert f"freshline {name}" in text


def test_no_file_contains_paths_of_the_build_machine():
    folders = [ROOT / name for name in (*PACKAGES, "tests", "docs")]
    texts = [file for folder in folders for file in folder.rglob("*.*") if "__pycache__" not in file.parts]
    texts += [file for file in ROOT.iterdir() if file.is_file() and not file.name.startswith(".")]
    # The brackets keep the pattern from matching itself.
    not_ours = re.compile(r"/wor[k]/|--index-[u]rl https?:|--find-[l]inks")
    assert len(texts) > 100
    assert [str(file) for file in texts if file.is_file() and not_ours.search(file.read_text(errors="replace"))] == []
