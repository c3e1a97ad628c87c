"""The contract of Generator, run on each implementation over its real protocol."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing

import boto3
import pytest
from botocore.config import Config
from model_endpoint import FACT, ON_TOPIC, ModelEndpoint, model_endpoint

from infra.generation.bedrock import BedrockGenerator
from infra.generation.extractive import ExtractiveGenerator
from infra.generation.openai import OpenAIGenerator
from infra.generation.port import (
    NO_ANSWER,
    AnswerPart,
    GenerationError,
    GenerationThrottled,
    Generator,
    SourceText,
    Written,
)

SOURCES = (
    SourceText(1, "The office opens at nine.\nIt closes at six.", "Office"),
    SourceText(
        2, "# Leave\n\n- Employees accrue **fifteen days** of vacation\n  a year.\n- Sick leave is unlimited.", None
    ),
)
OFF_TOPIC = "What burns in rockets?"


@pytest.fixture
def endpoint() -> Iterator[ModelEndpoint]:
    with model_endpoint() as endpoint:
        yield endpoint


@pytest.fixture(params=["extractive", "bedrock", "openai"])
async def generator(request: pytest.FixtureRequest, endpoint: ModelEndpoint) -> AsyncIterator[Generator]:
    generator: Generator
    match request.param:
        case "extractive":
            generator = ExtractiveGenerator()
        case "bedrock":
            client = boto3.client(
                "bedrock-runtime",
                region_name="us-east-1",
                endpoint_url=endpoint.url,
                aws_access_key_id="test",
                aws_secret_access_key="test",
                config=Config(retries={"total_max_attempts": 1}),
            )
            generator = BedrockGenerator(client, "test.model-v1", max_tokens=100)
        case _:
            generator = OpenAIGenerator(f"{endpoint.url}/v1", "test", api_key=None, max_tokens=100, timeout_s=5)
    yield generator
    await generator.close()


async def test_an_answer_cites_the_sentence_it_is_based_on(generator: Generator):
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
async def test_without_relevant_sources_there_is_no_answer(generator: Generator, sources: tuple[SourceText, ...]):
    answer = await generator.answer(OFF_TOPIC, sources)
    assert answer.text == NO_ANSWER
    assert answer.citations == ()


async def test_equal_questions_have_equal_answers(generator: Generator):
    assert await generator.answer(ON_TOPIC, SOURCES) == await generator.answer(ON_TOPIC, SOURCES)


async def streamed(generator: Generator, question: str, sources=SOURCES) -> tuple[list[AnswerPart], Written]:
    items = [item async for item in generator.stream(question, sources)]
    parts, [end] = items[:-1], items[-1:]
    assert all(isinstance(part, AnswerPart) for part in parts)
    assert isinstance(end, Written)
    return parts, end


@pytest.mark.parametrize("question", [ON_TOPIC, OFF_TOPIC])
async def test_streamed_parts_add_up_to_the_answer(generator: Generator, question: str):
    parts, end = await streamed(generator, question)
    assert end.answer == await generator.answer(question, SOURCES)
    assert "".join(part.text for part in parts) == end.answer.text
    assert tuple(citation for part in parts for citation in part.citations) == end.answer.citations


@pytest.fixture(params=["bedrock", "openai"])
async def model(request: pytest.FixtureRequest, endpoint: ModelEndpoint) -> AsyncIterator[Generator]:
    """The generators that use a connection."""
    if request.param == "openai":
        generator: Generator = OpenAIGenerator(f"{endpoint.url}/v1", "test", api_key=None, max_tokens=100, timeout_s=5)
    else:
        client = boto3.client(
            "bedrock-runtime",
            region_name="us-east-1",
            endpoint_url=endpoint.url,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            config=Config(retries={"total_max_attempts": 1}),
        )
        generator = BedrockGenerator(client, "test.model-v1", max_tokens=100)
    yield generator
    endpoint.may_go_on.set()
    await generator.close()


async def test_a_stream_arrives_as_it_is_generated_and_reports_its_tokens(model: Generator, endpoint: ModelEndpoint):
    endpoint.may_go_on.clear()
    async with asyncio.timeout(10), aclosing(model.stream(ON_TOPIC, SOURCES)) as stream:
        first = await anext(stream)
        assert isinstance(first, AnswerPart)
        assert first.text == FACT[:4]
        endpoint.may_go_on.set()
        *_, end = [item async for item in stream]
    assert isinstance(end, Written)
    assert (end.input_tokens, end.output_tokens) == (31, 7)


async def test_closing_a_stream_cancels_the_generation(model: Generator, endpoint: ModelEndpoint):
    endpoint.may_go_on.clear()
    async with asyncio.timeout(10):
        stream = model.stream(ON_TOPIC * 2_000, SOURCES)
        await anext(stream)
        await stream.aclose()
        endpoint.may_go_on.set()
    other = model.stream(ON_TOPIC, SOURCES)
    assert [item async for item in other][-1].answer.text == FACT  # the slot of the cancelled one is free


@pytest.mark.parametrize("fault", ["cut", "withheld", "throttled"])
async def test_a_broken_stream_is_an_error_and_no_truncated_answer(
    model: Generator, endpoint: ModelEndpoint, fault: str
):
    endpoint.fault = fault
    with pytest.raises(GenerationError) as raised:
        await streamed(model, ON_TOPIC)
    if fault == "throttled" and isinstance(model, BedrockGenerator):
        assert isinstance(raised.value, GenerationThrottled)


@pytest.mark.parametrize("status", [400, 500])
async def test_an_error_status_before_the_stream_is_an_error(model: Generator, endpoint: ModelEndpoint, status: int):
    endpoint.status = status
    with pytest.raises(GenerationError):
        await streamed(model, ON_TOPIC)


async def test_a_closed_openai_stream_closes_its_connection(endpoint: ModelEndpoint):
    generator = OpenAIGenerator(f"{endpoint.url}/v1", "test", api_key=None, max_tokens=100, timeout_s=5)
    endpoint.may_go_on.clear()
    stream = generator.stream(ON_TOPIC, SOURCES)
    await anext(stream)
    await stream.aclose()
    endpoint.may_go_on.set()
    assert await asyncio.to_thread(endpoint.gone.wait, 10)
    await generator.close()
