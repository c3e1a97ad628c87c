"""Chat completions over a real connection: what is sent, and what each kind of trouble becomes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import pytest
from pydantic import SecretStr

from infra.generation.extractive import ExtractiveGenerator
from infra.generation.factory import open_generator
from infra.generation.openai import OpenAIGenerator
from infra.generation.port import GenerationError, GenerationThrottled, SourceText
from infra.generation.prompt import build_prompt
from infra.settings import GenerationSettings

SOURCES = (SourceText(1, "Sick leave is unlimited.", None),)
KEY = "sk-very-secret"


@dataclass
class Endpoint:
    url: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    requests: list[tuple[str, dict[str, str], dict[str, object]]] = field(default_factory=list)
    may_answer: Event = field(default_factory=Event)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    endpoint.may_answer.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            endpoint.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}, request))
            endpoint.may_answer.wait(10)
            self.send_response(endpoint.status)
            for name, value in {**endpoint.headers, "content-length": str(len(endpoint.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(endpoint.body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
        yield endpoint
        endpoint.may_answer.set()
        server.shutdown()
        thread.join()


def connect(endpoint: Endpoint, timeout_s: float = 5) -> OpenAIGenerator:
    return OpenAIGenerator(endpoint.url, "tiny", api_key=SecretStr(KEY), max_tokens=123, timeout_s=timeout_s)


async def test_the_prompt_is_sent_and_the_reply_is_read(endpoint: Endpoint):
    endpoint.body = json.dumps({"id": "x", "choices": [{"message": {"content": "Unlimited [1]."}}]}).encode()
    generator = connect(endpoint)
    answer = await generator.answer("Sick leave?", SOURCES)
    await generator.close()
    assert answer.text == "Unlimited [1]."
    assert [citation.source for citation in answer.citations] == [1]
    ((path, headers, request),) = endpoint.requests
    prompt = build_prompt("Sick leave?", SOURCES)
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == f"Bearer {KEY}"
    assert request == {
        "model": "tiny",
        "messages": [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}],
        "max_tokens": 123,
        "temperature": 0,
    }


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(("headers", "retry_after_s"), [({"retry-after": "9"}, 9.0), ({}, 1.0)])
async def test_busy_is_distinguished(endpoint: Endpoint, status: int, headers: dict[str, str], retry_after_s: float):
    endpoint.status, endpoint.headers = status, headers
    generator = connect(endpoint)
    with pytest.raises(GenerationThrottled) as raised:
        await generator.answer("q", SOURCES)
    await generator.close()
    assert raised.value.retry_after_s == retry_after_s


async def test_a_refusal_does_not_repeat_the_key(endpoint: Endpoint):
    endpoint.status, endpoint.body = 401, f"invalid key {KEY}".encode()
    generator = connect(endpoint)
    with pytest.raises(GenerationError, match="401") as raised:
        await generator.answer("q", SOURCES)
    await generator.close()
    assert KEY not in str(raised.value)


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}'])
async def test_a_reply_without_text_is_an_error(endpoint: Endpoint, body: bytes):
    endpoint.body = body
    generator = connect(endpoint)
    with pytest.raises(GenerationError):
        await generator.answer("q", SOURCES)
    await generator.close()


async def test_silence_ends_at_the_time_limit(endpoint: Endpoint):
    endpoint.may_answer.clear()
    generator = connect(endpoint, timeout_s=0.2)
    with pytest.raises(GenerationError, match="ReadTimeout"):
        await generator.answer("q", SOURCES)
    await generator.close()


async def test_no_caller_there_is_an_error():
    generator = OpenAIGenerator("http://127.0.0.1:1/v1", "tiny", api_key=None, max_tokens=16, timeout_s=1)
    with pytest.raises(GenerationError, match="ConnectError"):
        await generator.answer("q", SOURCES)
    await generator.close()


@pytest.mark.parametrize(
    ("fields", "setting"),
    [
        ({"provider": "openai", "base_url": "http://127.0.0.1:1/v1"}, "generator.model"),
        ({"provider": "openai", "model": "tiny"}, "generator.base_url"),
        ({"provider": "bedrock", "region": "us-east-1"}, "generator.model"),
    ],
)
def test_a_missing_setting_is_named(fields: dict[str, str], setting: str):
    with pytest.raises(ValueError, match=setting):
        open_generator(GenerationSettings.model_validate(fields))


async def test_settings_open_each_generator():
    names = []
    for fields in (
        {},
        {"provider": "openai", "model": "tiny", "base_url": "http://127.0.0.1:1/v1"},
        {"provider": "bedrock", "model": "some.model", "region": "us-east-1"},
    ):
        generator = open_generator(GenerationSettings.model_validate(fields))
        names.append(generator.name)
        await generator.close()
    assert names == [ExtractiveGenerator.name, "openai:tiny", "bedrock:some.model"]
