"""What every generator promises, checked on each of them over its real protocol."""

import json
import re
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import boto3
import pytest

from infra.generation.bedrock import BedrockGenerator
from infra.generation.extractive import ExtractiveGenerator
from infra.generation.openai import OpenAIGenerator
from infra.generation.port import NO_ANSWER, Generator, SourceText

SOURCES = (
    SourceText(1, "The office opens at nine.\nIt closes at six.", "Office"),
    SourceText(
        2, "# Leave\n\n- Employees accrue **fifteen days** of vacation\n  a year.\n- Sick leave is unlimited.", None
    ),
)
ON_TOPIC = "How many days of vacation do employees accrue a year?"
OFF_TOPIC = "What burns in rockets?"


class ModelHandler(BaseHTTPRequestHandler):
    """A model that speaks both protocols and knows one fact."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        is_bedrock = self.path.endswith("/converse")
        content = request["messages"][-1]["content"]
        user = content[0]["text"] if is_bedrock else content
        text = "Employees accrue fifteen days of vacation [2]." if ON_TOPIC in user else NO_ANSWER
        reply = (
            {
                "output": {"message": {"role": "assistant", "content": [{"text": text}]}},
                "stopReason": "end_turn",
                "usage": {"inputTokens": 1, "outputTokens": 1, "totalTokens": 2},
                "metrics": {"latencyMs": 1},
            }
            if is_bedrock
            else {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
        )
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def model_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), ModelHandler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(params=["extractive", "bedrock", "openai"])
async def generator(request: pytest.FixtureRequest, model_url: str) -> AsyncIterator[Generator]:
    generator: Generator
    match request.param:
        case "extractive":
            generator = ExtractiveGenerator()
        case "bedrock":
            client = boto3.client(
                "bedrock-runtime",
                region_name="us-east-1",
                endpoint_url=model_url,
                aws_access_key_id="test",
                aws_secret_access_key="test",
            )
            generator = BedrockGenerator(client, "test.model-v1", max_tokens=100)
        case _:
            generator = OpenAIGenerator(f"{model_url}/v1", "test", api_key=None, max_tokens=100, timeout_s=5)
    yield generator
    await generator.close()


async def test_an_answer_cites_the_place_it_stands_on(generator: Generator):
    answer = await generator.answer(ON_TOPIC, SOURCES)
    assert "days" in answer.text
    assert "[2]" in answer.text
    (citation,) = answer.citations
    assert citation.source == 2
    assert citation.quote == "Employees accrue **fifteen days** of vacation\n  a year."


async def test_each_number_in_the_text_has_a_citation_and_each_quote_is_exact(generator: Generator):
    answer = await generator.answer(ON_TOPIC, SOURCES)
    texts = {source.number: source.text for source in SOURCES}
    assert {int(number) for number in re.findall(r"\[(\d+)\]", answer.text)} == {c.source for c in answer.citations}
    assert all(citation.quote in texts[citation.source] for citation in answer.citations)


@pytest.mark.parametrize("sources", [SOURCES, ()])
async def test_sources_that_hold_nothing_relevant_are_said_to(generator: Generator, sources: tuple[SourceText, ...]):
    answer = await generator.answer(OFF_TOPIC, sources)
    assert answer.text == NO_ANSWER
    assert answer.citations == ()


async def test_equal_questions_have_equal_answers(generator: Generator):
    assert await generator.answer(ON_TOPIC, SOURCES) == await generator.answer(ON_TOPIC, SOURCES)
