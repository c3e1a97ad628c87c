"""Titan's protocol: what is sent, and what each refusal becomes."""

import io
import json
from collections.abc import Iterator

import boto3
import numpy as np
import pytest
from botocore.config import Config
from botocore.response import StreamingBody
from botocore.stub import Stubber

from infra.embedding.bedrock import TITAN, BedrockEmbedder, connect
from infra.embedding.factory import open_tokenizer
from infra.embedding.port import EmbeddingError, EmbeddingThrottled
from infra.settings import EmbeddingSettings
from streams.core.splitting import Splitter


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


def expect(stubber: Stubber, text: str, reply: object) -> None:
    body = json.dumps(reply).encode()
    request = {"inputText": text, "dimensions": 256, "normalize": True}
    stubber.add_response(
        "invoke_model",
        {"body": StreamingBody(io.BytesIO(body), len(body)), "contentType": "application/json"},
        {
            "modelId": TITAN,
            "contentType": "application/json",
            "accept": "application/json",
            "body": json.dumps(request),
        },
    )


async def test_each_text_is_one_call_and_vectors_come_back_in_order(stubber: Stubber):
    rows = np.eye(256, dtype=np.float32)[:3]
    for text, row in zip("abc", rows, strict=True):
        expect(stubber, text, {"embedding": (2 * row).tolist()})
    embedder = BedrockEmbedder(stubber.client, dimension=256, calls=1)
    assert np.array_equal(await embedder.embed_passages(["a", "b", "c"]), rows)
    stubber.assert_no_pending_responses()
    await embedder.close()


async def test_a_long_text_is_cut_to_what_titan_takes(stubber: Stubber):
    expect(stubber, "x" * 50_000, {"embedding": np.eye(256)[0].tolist()})
    embedder = BedrockEmbedder(stubber.client, dimension=256)
    await embedder.embed_query("x" * 60_000)
    stubber.assert_no_pending_responses()
    await embedder.close()


@pytest.mark.parametrize(("headers", "retry_after_s"), [({"retry-after": "9"}, 9.0), ({}, 1.0)])
@pytest.mark.parametrize("code", ["ThrottlingException", "ServiceUnavailableException", "ModelNotReadyException"])
async def test_busy_is_distinguished(stubber: Stubber, code: str, headers: dict[str, str], retry_after_s: float):
    stubber.add_client_error("invoke_model", code, response_meta={"HTTPHeaders": headers})
    embedder = BedrockEmbedder(stubber.client, dimension=256)
    with pytest.raises(EmbeddingThrottled) as raised:
        await embedder.embed_query("a")
    assert raised.value.retry_after_s == retry_after_s
    await embedder.close()


async def test_a_refusal_gives_the_reason(stubber: Stubber):
    stubber.add_client_error("invoke_model", "ValidationException", "too many tokens")
    embedder = BedrockEmbedder(stubber.client, dimension=256)
    with pytest.raises(EmbeddingError, match="too many tokens") as raised:
        await embedder.embed_query("a")
    assert not isinstance(raised.value, EmbeddingThrottled)
    await embedder.close()


@pytest.mark.parametrize("reply", [{}, {"embedding": [1.0, 0.0]}, {"embedding": "no"}])
async def test_a_reply_that_is_no_vector_is_an_error(stubber: Stubber, reply: object):
    expect(stubber, "a", reply)
    embedder = BedrockEmbedder(stubber.client, dimension=256)
    with pytest.raises(EmbeddingError):
        await embedder.embed_query("a")
    await embedder.close()


def test_a_length_titan_does_not_have_is_refused(stubber: Stubber):
    with pytest.raises(ValueError, match="256, 512, 1024"):
        BedrockEmbedder(stubber.client, dimension=384)


def test_the_client_retries_and_has_a_connection_for_each_call():
    client = connect("us-east-1", calls=8)
    assert client.meta.config.retries == {"mode": "standard", "total_max_attempts": 4}
    assert client.meta.config.max_pool_connections == 16
    client.close()


def test_tokens_are_counted_by_characters_of_words():
    splitter = Splitter(open_tokenizer(EmbeddingSettings(provider="bedrock", model=TITAN, dimension=256)), 16)
    chunks = splitter.split("Hotels cost 120 dollars. " * 8, None)
    assert len(chunks) > 3
    assert all(len(chunk.text) < 16 * 5 for chunk in chunks)
