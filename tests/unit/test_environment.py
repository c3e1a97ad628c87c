"""Variables that no process reads are reported, so that a misspelled or removed setting is noticed."""

import json

import pytest
import structlog

from infra.environment import PROCESS_VARIABLES, setting_variables, unknown_variables
from infra.settings import Settings
from infra.telemetry.logging import configure_logging

PREFIX = "FRESHLINE_"


def test_a_misspelled_setting_is_reported_with_the_most_similar_one():
    names = [PREFIX + "REDDIS__URL", "PATH", (PREFIX + "NAME_SPACE").lower(), PREFIX + "XYZ"]
    assert unknown_variables(names) == {
        PREFIX + "REDDIS__URL": "FRESHLINE_REDIS__URL",
        PREFIX + "XYZ": None,
        (PREFIX + "NAME_SPACE").lower(): "FRESHLINE_NAMESPACE",
    }


def test_settings_and_variables_of_processes_are_known():
    assert unknown_variables([*setting_variables(), *PROCESS_VARIABLES, "freshline_namespace"]) == {}


@pytest.fixture
def restored_logging():
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.mark.usefixtures("restored_logging")
def test_each_process_logs_unknown_variables_without_their_values(monkeypatch, capsys):
    monkeypatch.setenv(PREFIX + "REDDIS__URL", "redis://:secret@host")
    configure_logging(Settings(log_format="json"))
    logged = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    [warning] = [line for line in logged if line["event"] == "unknown_setting"]
    assert (warning["variable"], warning["similar"]) == (PREFIX + "REDDIS__URL", "FRESHLINE_REDIS__URL")
    assert "secret" not in str(logged)
