import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import typer
from typer.testing import CliRunner

from freshline.cli.app import app, main
from freshline.cli.terminal import explain
from infra.local import StackError
from infra.settings import Settings

COMMANDS = typer.main.get_command(app).commands

ANSWER = {
    "results": [
        {
            "text": "Up to 30 days\na year.",
            "score": 0.0325,
            "document_id": "travel.md",
            "version": 7,
            "title": "Travel",
            "source": None,
            "heading_path": ["Travel", "Abroad"],
            "span": [0, 22],
        }
    ],
    "answer": "Up to 30 days a year. [1]",
    "query_time_ms": 11.8,
    "cached": True,
    "as_of": {"positions": {"3": 41}, "checked_ms": 1767225600000.0},
}
PROBLEM = {
    "type": "/problems/invalid-request",
    "title": "The request is not valid",
    "status": 422,
    "detail": "the question has wrong fields",
    "errors": [{"field": "top_k", "message": "at most 50"}],
}


class Service(ThreadingHTTPServer):
    """A service with scripted responses that records its requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str | None, dict]] = []
        self.states: tuple[int, dict] = (200, ANSWER)


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, self.headers["authorization"], body))
        status, answer = self.server.states
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """An installation that the environment names."""
    with Service() as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        monkeypatch.setenv("FRESHLINE_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")
        monkeypatch.setenv("FRESHLINE_QUERY__PORT", str(service.server_address[1]))
        monkeypatch.setenv("FRESHLINE_TENANT__API_KEY", "secret")
        yield service
        service.shutdown()


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "freshline", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"bench"}))
def test_help_of_every_command_has_examples_line_by_line(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"]).output
    lines = [line.strip() for line in shown.splitlines()]
    examples = lines[lines.index("Examples:") + 1 :]
    examples = examples[: examples.index("")]
    assert examples
    assert all(f"freshline {name}" in line for line in examples)


def test_help_imports_nothing_heavy() -> None:
    heavy = ["pydantic", "httpx", "aiokafka", "faust", "numpy", "onnxruntime", "fastapi"]
    script = f"import sys, freshline.cli.app; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ingest"], "give one source"),
        (["ingest", ".", "--events", __file__], "give one source"),
        (["ingest", ".", "--follow"], "--watch requires a directory"),
        (["up", "--nodes", "2"], "--nodes is 1 or 3"),
        (["up", "--port", "query"], "NAME=PORT"),
        (["up", "--port", "query=70000"], "NAME=PORT"),
        (["worker", "embed"], "prepare, index, invalidate"),
        (["demo", "--docs", ".", "--git", "."], "choose one"),
        (["ask"], "Missing argument"),
        (["ask", "x", "--top-k", "51"], "50"),
        (["ask", "x", "--filter", "title"], "NAME=VALUE"),
        (["explain-cache", "x", "--filter", "=y"], "NAME=VALUE"),
        (["nosuch"], "nosuch"),
    ],
)
def test_wrong_usage_exits_with_two(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_answer_for_a_person(elsewhere: Service) -> None:
    result = CliRunner().invoke(app, ["ask", "How long?", "--top-k", "3"])
    assert result.exit_code == 0
    assert elsewhere.asked == [
        ("/v1/query", "Bearer secret", {"query": "How long?", "top_k": 3, "generate": True}),
    ]
    lines = result.stdout.splitlines()
    assert lines[0] == "Up to 30 days a year. [1]"
    assert "[1] Travel > Abroad" in lines
    assert "    Up to 30 days a year." in lines
    assert "cached" in lines[-1]
    assert "first 42 events" in lines[-1]


def test_answer_for_a_program(elsewhere: Service) -> None:
    result = CliRunner().invoke(app, ["ask", "x", "--no-generate", "--min-position", "documents.v1-3:41", "--json"])
    assert json.loads(result.stdout) == ANSWER
    assert result.stdout.count("\n") == 1
    assert elsewhere.asked[0][2] == {
        "query": "x",
        "top_k": 5,
        "generate": False,
        "min_position": "documents.v1-3:41",
    }


@pytest.mark.parametrize(("command", "path"), [("ask", "/v1/query"), ("explain-cache", "/v1/cache:explain")])
def test_an_answer_is_explained_by_the_options_that_it_is_asked_with(elsewhere: Service, command, path) -> None:
    filters = ["metadata.team=legal", "title=a=b", "metadata.team=people"]
    options = [part for one in filters for part in ("--filter", one)]
    CliRunner().invoke(app, [command, "x", "--top-k", "7", *options, "--json"])
    wanted = {"metadata.team": ["legal", "people"], "title": ["a=b"]}
    sent = {"query": "x", "top_k": 7, "generate": True, "filters": wanted}
    assert elsewhere.asked == [(path, "Bearer secret", sent)]


def test_refusal_is_one_line_that_names_the_field(elsewhere: Service) -> None:
    elsewhere.states = (422, PROBLEM)
    ended = run("ask", "x")
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr == ("error: The request is not valid: the question has wrong fields (top_k: at most 50)\n")


def test_service_that_is_not_there_is_named_with_what_to_do(elsewhere: Service) -> None:
    elsewhere.shutdown()
    elsewhere.server_close()
    ended = run("ask", "x")
    assert ended.returncode == 1
    assert "freshline up" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Traceback" in run("ask", "x", FRESHLINE_LOG_LEVEL="debug").stderr


def test_wrong_setting_is_named_without_its_value() -> None:
    ended = run("ask", "x", FRESHLINE_KAFKA__BOOTSTRAP_SERVERS="x", FRESHLINE_QUERY__PORT="hunter2")
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: FRESHLINE_QUERY__PORT: ")
    assert "hunter2" not in ended.stderr


def test_errors_of_others_come_with_their_type() -> None:
    assert explain(StackError("port 1 is in use")) == "port 1 is in use"
    assert explain(OSError("disk full")) == "OSError: disk full"
    assert explain(KeyError()) == "KeyError"
    assert explain(ExceptionGroup("both", [StackError("first"), StackError("second")])) == "first"
    with pytest.raises(ValueError, match="query") as caught:
        Settings(query={"port": -1})
    assert explain(caught.value).startswith("FRESHLINE_QUERY__PORT: ")


def test_interrupt_has_its_own_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("freshline.installation.find", interrupted)
    monkeypatch.setattr(sys, "argv", ["freshline", "lag"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
