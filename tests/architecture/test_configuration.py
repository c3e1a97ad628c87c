"""docs/configuration.md tells of every setting, under the name by which a process takes it, and of nothing else."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from infra.settings import Settings

ROOT = Path(__file__).parents[2]
PLACES = {
    "FRESHLINE_HOME",
    "FRESHLINE_CACHE",
    "FRESHLINE_TEST_STACK",
    "FRESHLINE_TEST_HOME",
    "FRESHLINE_LISTEN_FD",
    "FRESHLINE_READY_FD",
    "FRESHLINE_PEERS_DIR",
}
"""Read before there are settings."""

_ROW = re.compile(r"^\| `(FRESHLINE_[A-Z0-9_]+)` \| (?:`(.*?)`)? \| (.+) \|$", re.MULTILINE)
TABLE = {
    name: (default, meaning)
    for name, default, meaning in _ROW.findall((ROOT / "docs/configuration.md").read_text(encoding="utf-8"))
    if name not in PLACES
}


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch):
    for name in TABLE:
        monkeypatch.delenv(name, raising=False)


def names(model: type[BaseModel], prefix: str) -> set[str]:
    found = set()
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= names(field.annotation, f"{prefix}{name.upper()}__")
        else:
            found.add(f"{prefix}{name.upper()}")
    return found


def test_every_setting_is_there_and_nothing_else():
    assert set(TABLE) == names(Settings, "FRESHLINE_")
    assert all(meaning for _, meaning in TABLE.values())


def test_the_defaults_are_what_a_process_has_without_them(monkeypatch):
    without = Settings()
    for name, (default, _) in TABLE.items():
        if default:
            monkeypatch.setenv(name, default)
    assert Settings() == without


@pytest.mark.parametrize("name", TABLE)
def test_each_name_reaches_its_setting(name, monkeypatch):
    before = Settings().model_dump()
    default, meaning = TABLE[name]
    monkeypatch.setenv(name, another(default, meaning))
    path = name.removeprefix("FRESHLINE_").lower().split("__")
    changed = Settings().model_dump()
    for part in path:
        before, changed = before[part], changed[part]
    assert changed != before


def another(default: str, meaning: str) -> str:
    """A value that the setting takes and does not have."""
    if choices := re.search(r"One of (.+)\.$", meaning):
        return next(word for word in re.findall(r"`(.+?)`", choices[1]) if word != default)
    if re.fullmatch(r"\d+(\.\d+)?", default):
        top = re.search(r"at most ([0-9]+)", meaning, re.IGNORECASE)
        return str(int(float(default)) + 1) if not top or int(top[1]) > float(default) else str(int(top[1]) - 1)
    return {"g1": "g2"}.get(default, "elsewhere")


def test_names_in_code_and_texts_are_settings():
    told = [file for kind in ("*.py", "*.md", "Makefile") for file in ROOT.rglob(kind) if ours(file)]
    mentioned = {name for file in told for name in re.findall(r"FRESHLINE_[A-Z][A-Z0-9_]*[A-Z0-9]", file.read_text())}
    assert len(mentioned) > 10
    assert mentioned - set(TABLE) - PLACES == set()


def ours(file: Path) -> bool:
    inside = file.relative_to(ROOT).parts[0]
    return not inside.startswith(".") and not inside.endswith("-data")
