"""The contract of Embedder, run on each implementation."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import boto3
import numpy as np
import pytest

from infra.embedding.batching import BatchingEmbedder
from infra.embedding.bedrock import BedrockEmbedder
from infra.embedding.hashing import HashingEmbedder
from infra.embedding.onnx import RECIPES, OnnxEmbedder
from infra.embedding.port import Embedder
from infra.settings import Settings

TEXTS = (
    "The office opens at nine in the morning.",
    "Employees accrue fifteen days of vacation a year.",
    "Rockets burn liquid oxygen and kerosene. " * 12,
    "A cat sat.",
    "The office opens at nine in the morning.",
    "!?",
)


class TitanHandler(BaseHTTPRequestHandler):
    """Bedrock's InvokeModel of Titan, with word hashes as vectors."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        vector = HashingEmbedder(request["dimensions"])._embed(request["inputText"])
        body = json.dumps({"embedding": vector.tolist(), "inputTextTokenCount": 1}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def titan_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), TitanHandler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def open_onnx(name: str) -> OnnxEmbedder:
    return OnnxEmbedder(Settings().embedding.models_path, name, threads=2)


@pytest.fixture(scope="module", params=["hashing", "batching", "bedrock", *RECIPES])
async def embedder(request: pytest.FixtureRequest, titan_url: str) -> AsyncIterator[Embedder]:
    embedder: Embedder
    match request.param:
        case "hashing":
            embedder = HashingEmbedder()
        case "batching":
            embedder = BatchingEmbedder(HashingEmbedder(), batch_size=2)
        case "bedrock":
            client = boto3.client(
                "bedrock-runtime",
                region_name="us-east-1",
                endpoint_url=titan_url,
                aws_access_key_id="test",
                aws_secret_access_key="test",
            )
            embedder = BedrockEmbedder(client, dimension=256, calls=4)
        case name:
            embedder = open_onnx(name)
    yield embedder
    await embedder.close()


async def test_passages_keep_their_order_and_have_unit_length(embedder: Embedder):
    vectors = await embedder.embed_passages(TEXTS)
    assert vectors.shape == (len(TEXTS), embedder.model.dimension)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(TEXTS)), abs=1e-5)
    for text, vector in zip(TEXTS, vectors, strict=True):
        assert np.array_equal((await embedder.embed_passages([text]))[0], vector), text


async def test_no_passages_give_an_empty_matrix(embedder: Embedder):
    vectors = await embedder.embed_passages([])
    assert vectors.shape == (0, embedder.model.dimension)
    assert vectors.dtype == np.float32


async def test_a_vector_does_not_depend_on_concurrent_calls(embedder: Embedder):
    alone = await embedder.embed_passages([TEXTS[1]])
    together = await asyncio.gather(*(embedder.embed_passages([TEXTS[1], text]) for text in TEXTS * 3))
    for vectors in together:
        assert np.array_equal(vectors[0], alone[0])


async def test_a_question_is_most_similar_to_its_passage(embedder: Embedder):
    question = await embedder.embed_query("How many days of vacation do employees accrue?")
    assert question.shape == (embedder.model.dimension,)
    assert question.dtype == np.float32
    assert np.linalg.norm(question) == pytest.approx(1, abs=1e-5)
    assert int(np.argmax(await embedder.embed_passages(TEXTS) @ question)) == 1


async def test_text_beyond_the_token_limit_is_cut_off(embedder: Embedder):
    vectors = await embedder.embed_passages(["vacation days " * 10_000])
    assert np.linalg.norm(vectors[0]) == pytest.approx(1, abs=1e-5)


async def test_a_cancelled_call_does_not_affect_the_next(embedder: Embedder):
    call = asyncio.create_task(embedder.embed_passages([f"text {number}" for number in range(200)]))
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert (await embedder.embed_passages(TEXTS)).shape == (len(TEXTS), embedder.model.dimension)


async def test_the_fingerprint_names_the_model(embedder: Embedder):
    assert embedder.model.fingerprint.startswith(embedder.model.name)
    assert embedder.model.max_tokens > 0
