"""Log lines: one format for our own and the libraries' loggers."""

import logging

import orjson
import pytest
import structlog

from infra.settings import Settings
from infra.telemetry.logging import configure_logging


@pytest.fixture
def lines(capsys):
    root = logging.getLogger()
    before = root.handlers, root.level
    yield lambda: capsys.readouterr().err.splitlines()  # noqa: PLW0108 - reads what was written by the time of the call
    root.handlers, level = before
    root.setLevel(level)
    structlog.reset_defaults()


def test_own_and_foreign_lines_are_alike(lines):
    configure_logging(Settings(log_format="json"))
    structlog.get_logger("ingest.main").info("listening", port=8081)
    logging.getLogger("some.library").warning("slow %s", "disk", extra={"took_ms": 3})
    own, foreign = (orjson.loads(line) for line in lines())
    assert (own["event"], own["port"], own["level"], own["logger"]) == ("listening", 8081, "info", "ingest.main")
    assert (foreign["event"], foreign["took_ms"], foreign["logger"]) == ("slow disk", 3, "some.library")
    assert own["timestamp"].endswith("Z")


def test_level_and_talkative_libraries(lines):
    configure_logging(Settings(log_level="info"))
    structlog.get_logger("ingest").debug("fine detail")
    logging.getLogger("httpx").info("HTTP Request: PUT …")
    logging.getLogger("aiokafka.conn").warning("lost")
    assert [orjson.loads(line)["event"] for line in lines()] == ["lost"]


def test_traceback_shows_no_local_variables(lines):
    configure_logging(Settings(log_format="console"))

    def fail(key):
        raise ValueError(len(key))

    try:
        fail("hunter" + "2")
    except ValueError:
        structlog.get_logger("ingest").exception("failed")
    text = "\n".join(lines())
    assert "ValueError: 7" in text
    assert "hunter2" not in text
