"""Amazon Titan Text Embeddings V2 on Bedrock."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import boto3
import numpy as np
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from typing_extensions import override

from infra.embedding.port import Embedder, EmbeddingError, EmbeddingThrottled, Matrix, ModelInfo
from infra.embedding.thread_pools import EmbeddingThreadPools
from schemas.search import Vector

if TYPE_CHECKING:
    from mypy_boto3_bedrock_runtime import BedrockRuntimeClient

TITAN: Final = "amazon.titan-embed-text-v2:0"
DIMENSIONS: Final = (256, 512, 1024)
MAX_CHARS: Final = 50_000

_MAX_TOKENS: Final = 8_192
_CHARS_OF_A_TOKEN: Final = 4
_UNKNOWN: Final = "?"
_BUSY: Final = frozenset(
    {"ThrottlingException", "TooManyRequestsException", "ServiceUnavailableException", "ModelNotReadyException"}
)
_DEFAULT_RETRY_AFTER_S: Final = 1.0


def connect(region: str | None, *, calls: int) -> "BedrockRuntimeClient":
    """A client that retries by itself and has a connection for each of ``calls`` calls at a time, in both lanes."""
    return boto3.client(
        "bedrock-runtime",
        region_name=region,
        config=Config(
            retries={"mode": "standard", "total_max_attempts": 4},
            max_pool_connections=2 * calls,
            connect_timeout=3,
            read_timeout=20,
        ),
    )


def token_counter() -> Tokenizer:
    """Counts tokens for whoever splits texts.

    Titan's own tokenizer is not published; its documentation speaks of some four characters of English for a token. So
    a word or sign counts as one for each four characters that it begins.
    """
    counter = Tokenizer(models.WordLevel({_UNKNOWN: 0}, unk_token=_UNKNOWN))
    pieces = pre_tokenizers.Split(Regex(f".{{1,{_CHARS_OF_A_TOKEN}}}"), "isolated")
    counter.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pieces])
    return counter


class BedrockEmbedder(Embedder):
    """Titan V2, which takes one text a call: a batch is a bounded number of calls at a time.

    Args:
        client: whose retries are spent before an error is raised.
        dimension: one of ``DIMENSIONS``.
        calls: calls at a time in each lane.

    Raises:
        ValueError: Titan has no vectors of that length.
    """

    def __init__(self, client: "BedrockRuntimeClient", *, dimension: int, calls: int = 8) -> None:
        if dimension not in DIMENSIONS:
            raise ValueError(f"embedding.dimension is {dimension}; {TITAN} has {', '.join(map(str, DIMENSIONS))}")
        self._client = client
        self.model = ModelInfo(TITAN, dimension, max_tokens=_MAX_TOKENS, fingerprint=f"{TITAN}@{dimension}")
        self._lanes = EmbeddingThreadPools(self._embed, dimension=dimension, threads=calls)

    @override
    async def embed_passages(self, texts: Sequence[str]) -> Matrix:
        return await self._lanes.passages(texts)

    @override
    async def embed_query(self, text: str) -> Vector:
        return await self._lanes.query(text)

    @override
    async def close(self) -> None:
        await self._lanes.close()
        self._client.close()

    def _embed(self, text: str) -> Vector:
        # Titan refuses what is too long instead of cutting it.
        request = {"inputText": text[:MAX_CHARS], "dimensions": self.model.dimension, "normalize": True}
        try:
            response = self._client.invoke_model(
                modelId=TITAN, contentType="application/json", accept="application/json", body=json.dumps(request)
            )
            vector = np.array(json.loads(response["body"].read())["embedding"], dtype=np.float32)
        except ClientError as error:
            if error.response["Error"]["Code"] in _BUSY:
                raise EmbeddingThrottled(f"{TITAN} is busy", retry_after_s=_retry_after_s(error)) from error
            raise EmbeddingError(f"{TITAN} refused: {error.response['Error']['Message']}") from error
        except (BotoCoreError, KeyError, ValueError) as error:
            raise EmbeddingError(f"{TITAN} gave no vector: {error}") from error
        if vector.shape != (self.model.dimension,):
            raise EmbeddingError(f"{TITAN} gave a vector of shape {vector.shape}, not ({self.model.dimension},)")
        # It says it normalises, but in its own precision.
        return vector / np.linalg.norm(vector)


def _retry_after_s(error: ClientError) -> float:
    text = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", "")
    return float(text) if text.isdecimal() else _DEFAULT_RETRY_AFTER_S
