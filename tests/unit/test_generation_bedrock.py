"""Converse: what is sent, and what each refusal becomes."""

from collections.abc import Iterator

import boto3
import pytest
from botocore.config import Config
from botocore.stub import Stubber

from infra.generation.bedrock import BedrockGenerator, connect
from infra.generation.port import GenerationError, GenerationThrottled, SourceText
from infra.generation.prompt import build_prompt

SOURCES = (SourceText(1, "Sick leave is unlimited.", None),)


@pytest.fixture
def stubber() -> Iterator[Stubber]:
    client = boto3.client(
        "bedrock-runtime",
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
        config=Config(retries={"total_max_attempts": 1}),
    )
    with Stubber(client) as stubber:
        yield stubber


def reply(stop_reason: str, *texts: str) -> dict[str, object]:
    return {
        "output": {"message": {"role": "assistant", "content": [{"text": text} for text in texts]}},
        "stopReason": stop_reason,
        "usage": {"inputTokens": 1, "outputTokens": 1, "totalTokens": 2},
        "metrics": {"latencyMs": 1},
    }


async def test_the_prompt_is_sent_and_all_blocks_of_the_reply_are_read(stubber: Stubber):
    prompt = build_prompt("Sick leave?", SOURCES)
    stubber.add_response(
        "converse",
        reply("end_turn", "It is ", "unlimited [1]."),
        {
            "modelId": "some.model",
            "system": [{"text": prompt.system}],
            "messages": [{"role": "user", "content": [{"text": prompt.user}]}],
            "inferenceConfig": {"maxTokens": 123, "temperature": 0.0},
        },
    )
    generator = BedrockGenerator(stubber.client, "some.model", max_tokens=123)
    answer = await generator.answer("Sick leave?", SOURCES)
    assert answer.text == "It is unlimited [1]."
    assert [citation.quote for citation in answer.citations] == ["Sick leave is unlimited."]
    stubber.assert_no_pending_responses()
    await generator.close()


@pytest.mark.parametrize("code", ["ThrottlingException", "ServiceUnavailableException", "ModelNotReadyException"])
async def test_busy_is_distinguished(stubber: Stubber, code: str):
    stubber.add_client_error("converse", code)
    generator = BedrockGenerator(stubber.client, "some.model", max_tokens=100)
    with pytest.raises(GenerationThrottled) as raised:
        await generator.answer("q", SOURCES)
    assert raised.value.retry_after_s > 0
    await generator.close()


async def test_a_refusal_gives_the_reason(stubber: Stubber):
    stubber.add_client_error("converse", "AccessDeniedException", "no access to this model")
    generator = BedrockGenerator(stubber.client, "some.model", max_tokens=100)
    with pytest.raises(GenerationError, match="no access to this model"):
        await generator.answer("q", SOURCES)
    await generator.close()


async def test_a_guardrail_ends_in_an_error_not_in_an_answer(stubber: Stubber):
    stubber.add_response("converse", reply("guardrail_intervened", "Sorry."))
    generator = BedrockGenerator(stubber.client, "some.model", max_tokens=100)
    with pytest.raises(GenerationError, match="guardrail_intervened"):
        await generator.answer("q", SOURCES)
    await generator.close()


def test_the_client_gives_up_in_time():
    client = connect("us-east-1", timeout_s=7)
    assert client.meta.config.read_timeout == 7
    assert client.meta.config.retries["total_max_attempts"] == 2
    client.close()
