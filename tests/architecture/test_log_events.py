"""Log events have one form: a snake_case name, with everything else in fields; each module has one logger, ``_log``."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("freshline", "infra", "ingest", "query", "streams", "schemas", "bench", "chaos")
MODULES = {
    file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
    for package in PACKAGES
    for file in sorted((ROOT / package).rglob("*.py"))
}
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def is_get_logger(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr == "get_logger"


def logged(tree: ast.AST) -> list[ast.Call]:
    """Calls of a logger's methods."""
    return [
        call
        for call in calls(tree)
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in LEVELS
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id in {"log", "_log", "logger", "_logger"}
    ]


def event_of(call: ast.Call) -> str | None:
    first = call.args[0] if call.args else None
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None


EVENTS = {
    event: name for name, tree in MODULES.items() for call in logged(tree) if (event := event_of(call)) is not None
}


@pytest.mark.parametrize("name", [name for name, tree in MODULES.items() if any(map(is_get_logger, calls(tree)))])
def test_the_logger_of_a_module_is_named_log(name):
    assigned = [
        node.targets[0]
        for node in MODULES[name].body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and is_get_logger(node.value)
    ]
    assert [target.id for target in assigned if isinstance(target, ast.Name)] == ["_log"]
    assert sum(map(is_get_logger, calls(MODULES[name]))) == 1


@pytest.mark.parametrize("name", [name for name, tree in MODULES.items() if logged(tree)])
def test_events_are_snake_case_names(name):
    for call in logged(MODULES[name]):
        event = event_of(call)
        assert event is not None, f"line {call.lineno}: the event is not a literal"
        assert re.fullmatch(r"[a-z]+(_[a-z0-9]+)*", event), f"line {call.lineno}: {event!r}"
        assert len(call.args) == 1, f"line {call.lineno}: arguments are fields"


def test_documented_events_exist():
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    section = page[page.index("\n## Logs") : page.index("\n## Dead letters")]
    rows = re.findall(r"^\| (`[^|]+`) \|", section, re.MULTILINE)
    documented = {event for row in rows for event in re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)`", row)}
    assert len(documented) > 20
    assert documented - set(EVENTS) == set()


def test_warnings_and_errors_of_long_running_processes_are_documented():
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    served = ("infra/web", "infra/credentials", "infra/redis", "infra/kafka", "ingest/", "query/", "streams/")
    missing = {
        (name, event)
        for name, tree in MODULES.items()
        for call in logged(tree)
        if name.startswith(served) and call.func.attr in LEVELS - {"debug", "info"}
        if (event := event_of(call)) and f"`{event}`" not in page
    }
    assert missing == set()
