"""docs/configuration.md lists every setting under the name of its environment variable, and no other name."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from infra.environment import PROCESS_VARIABLES, setting_variables
from infra.settings import Section, Settings

ROOT = Path(__file__).parents[2]
SOURCES = {
    file: file.read_text(encoding="utf-8")
    for package in ("freshline", "infra", "ingest", "query", "streams")
    for file in (ROOT / package).rglob("*.py")
}
_ROW = re.compile(r"^\| `(FRESHLINE_[A-Z0-9_]+)` \| (?:`(.*?)`)? \| (?:basic|advanced) \| (.+) \|$", re.MULTILINE)
TABLE = {
    name: (default, meaning)
    for name, default, meaning in _ROW.findall((ROOT / "docs/configuration.md").read_text(encoding="utf-8"))
    if name not in PROCESS_VARIABLES
}


@pytest.fixture(autouse=True)
def _without_variables(monkeypatch):
    for name in TABLE:
        monkeypatch.delenv(name, raising=False)


def test_the_table_lists_exactly_the_settings():
    assert set(TABLE) == setting_variables()
    assert all(meaning for _, meaning in TABLE.values())


def sections(model: type[BaseModel]) -> list[type[Section] | type[Settings]]:
    nested = [field.annotation for field in model.model_fields.values()]
    return [model, *(one for one in nested if isinstance(one, type) and issubclass(one, Section))]


@pytest.mark.parametrize("section", sections(Settings), ids=lambda section: section.__name__)
def test_basic_settings_exist(section):
    assert set(section.model_fields) >= section.BASIC


def is_read(name: str) -> bool:
    """Whether a module reads the field of the setting: from its section, or where it handles the section's class."""
    *section, field = name.removeprefix("FRESHLINE_").lower().split("__")
    if not section:
        return any(re.search(rf"\b(settings|self)\.{field}\b", text) for text in SOURCES.values())
    kind = Settings.model_fields[section[0]].annotation
    classes = "|".join(one.__name__ for one in kind.__mro__ if issubclass(one, Section) and one is not Section)
    handles = re.compile(rf"\.{section[0]}\b|\b({classes})\b")
    return any(
        re.search(rf"\.{section[0]}\.{field}\b", text)
        or (file.name != "settings.py" and handles.search(text) and re.search(rf"\.{field}\b", text))
        for file, text in SOURCES.items()
    )


@pytest.mark.parametrize("name", TABLE)
def test_each_setting_is_read_by_the_code(name):
    assert is_read(name)


@pytest.mark.parametrize("name", ["JWT__TIMEOUT_S", "REDIS__SHARDS", "ALERTS__REGION", "UNUSED"])
def test_a_setting_is_not_read_because_another_section_has_its_name(name):
    assert not is_read(f"FRESHLINE_{name}")


def test_the_listed_defaults_are_those_of_the_settings(monkeypatch):
    without = Settings()
    for name, (default, _) in TABLE.items():
        if default:
            monkeypatch.setenv(name, default)
    assert Settings() == without


@pytest.mark.parametrize("name", TABLE)
def test_each_variable_changes_its_setting(name, monkeypatch):
    before = Settings().model_dump()
    default, meaning = TABLE[name]
    monkeypatch.setenv(name, another(default, meaning))
    path = name.removeprefix("FRESHLINE_").lower().split("__")
    changed = Settings().model_dump()
    for part in path:
        before, changed = before[part], changed[part]
    assert changed != before


def another(default: str, meaning: str) -> str:
    """A valid value that differs from the default."""
    if choices := re.search(r"One of (.+)\.$", meaning):
        return next(word for word in re.findall(r"`(.+?)`", choices[1]) if word != default)
    if re.fullmatch(r"\d+(\.\d+)?", default):
        top = re.search(r"at most ([0-9]+)", meaning, re.IGNORECASE)
        return str(int(float(default)) + 1) if not top or int(top[1]) > float(default) else str(int(top[1]) - 1)
    return {"g1": "g2"}.get(default, "elsewhere")


def test_variables_named_in_code_and_documentation_are_settings():
    texts = [file for kind in ("*.py", "*.md", "Makefile") for file in ROOT.rglob(kind) if is_of_the_project(file)]
    mentioned = {name for file in texts for name in re.findall(r"FRESHLINE_[A-Z][A-Z0-9_]*[A-Z0-9]", file.read_text())}
    assert len(mentioned) > 10
    assert mentioned - set(TABLE) - PROCESS_VARIABLES == set()


def is_of_the_project(file: Path) -> bool:
    inside = file.relative_to(ROOT).parts[0]
    return not inside.startswith(".") and not inside.endswith("-data")
