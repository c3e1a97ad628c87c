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
_CHARS_PER_TOKEN: Final = 4
_UNKNOWN: Final = "?"
_BUSY: Final = frozenset(
    {"ThrottlingException", "TooManyRequestsException", "ServiceUnavailableException", "ModelNotReadyException"}
)
_DEFAULT_RETRY_AFTER_S: Final = 1.0


def connect(region: str | None, *, calls: int) -> "BedrockRuntimeClient":
    """A client with retries, and with connections for ``calls`` concurrent calls in each thread pool."""
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
    """Approximate tokenizer for the splitter.

    The tokenizer of Titan is not published; its documentation states about four characters of English per token. So
    each word or symbol counts as one token per four characters, rounded up.
    """
    counter = Tokenizer(models.WordLevel({_UNKNOWN: 0}, unk_token=_UNKNOWN))
    pieces = pre_tokenizers.Split(Regex(f".{{1,{_CHARS_PER_TOKEN}}}"), "isolated")
    counter.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pieces])
    return counter


class BedrockEmbedder(Embedder):
    """Titan V2. It accepts one text per call, so a batch is a bounded number of concurrent calls.

    Args:
        client: client with its own retries.
        dimension: one of ``DIMENSIONS``.
        calls: concurrent calls of each thread pool.

    Raises:
        ValueError: Titan does not support this dimension.
    """

    def __init__(self, client: "BedrockRuntimeClient", *, dimension: int, calls: int = 8) -> None:
        if dimension not in DIMENSIONS:
            raise ValueError(f"embedding.dimension is {dimension}; {TITAN} supports {', '.join(map(str, DIMENSIONS))}")
        self._client = client
        self._model = ModelInfo(TITAN, dimension, max_tokens=_MAX_TOKENS, fingerprint=f"{TITAN}@{dimension}")
        self._pools = EmbeddingThreadPools(self._embed, dimension=dimension, threads=calls)

    @property
    @override
    def model(self) -> ModelInfo:
        return self._model

    @override
    async def embed_passages(self, texts: Sequence[str]) -> Matrix:
        return await self._pools.passages(texts)

    @override
    async def embed_query(self, text: str) -> Vector:
        return await self._pools.query(text)

    @override
    async def close(self) -> None:
        await self._pools.close()
        self._client.close()

    def _embed(self, text: str) -> Vector:
        # Titan rejects longer texts instead of truncating them.
        request = {"inputText": text[:MAX_CHARS], "dimensions": self._model.dimension, "normalize": True}
        try:
            response = self._client.invoke_model(
                modelId=TITAN, contentType="application/json", accept="application/json", body=json.dumps(request)
            )
            vector = np.array(json.loads(response["body"].read())["embedding"], dtype=np.float32)
        except ClientError as error:
            if error.response["Error"]["Code"] in _BUSY:
                raise EmbeddingThrottled(f"{TITAN} throttled the call", retry_after_s=_retry_after_s(error)) from error
            raise EmbeddingError(f"{TITAN} rejected the text: {error.response['Error']['Message']}") from error
        except (BotoCoreError, KeyError, ValueError) as error:
            raise EmbeddingError(f"{TITAN} returned no vector: {error}") from error
        if vector.shape != (self._model.dimension,):
            raise EmbeddingError(f"{TITAN} returned a vector of shape {vector.shape}, not ({self._model.dimension},)")
        # Titan normalizes with lower precision.
        return vector / np.linalg.norm(vector)


def _retry_after_s(error: ClientError) -> float:
    text = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", "")
    return float(text) if text.isdecimal() else _DEFAULT_RETRY_AFTER_S
