"""A language model on Amazon Bedrock, through its Converse API."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from infra.embedding.port import Vector
from infra.generation.port import GeneratedAnswer, GenerationError, GenerationThrottled, SourceText
from infra.generation.prompt import Prompt, build_prompt, read_answer

if TYPE_CHECKING:
    from mypy_boto3_bedrock_runtime import BedrockRuntimeClient

CALLS: Final = 16
"""Answers written at a time by one process."""

_BUSY: Final = frozenset({"ThrottlingException", "ServiceUnavailableException", "ModelNotReadyException"})
_DEFAULT_RETRY_AFTER_S: Final = 1.0


def connect(region: str | None, *, timeout_s: float) -> "BedrockRuntimeClient":
    """A client that retries once by itself, for somebody is waiting."""
    return boto3.client(
        "bedrock-runtime",
        region_name=region,
        config=Config(
            retries={"mode": "standard", "total_max_attempts": 2},
            max_pool_connections=CALLS,
            connect_timeout=3,
            read_timeout=timeout_s,
        ),
    )


class BedrockGenerator:
    """Any Bedrock model that can converse.

    Args:
        client: whose retries are spent before an error is raised.
        model: model or inference profile id.
        max_tokens: longest answer.
    """

    def __init__(self, client: "BedrockRuntimeClient", model: str, *, max_tokens: int) -> None:
        self._client = client
        self._model = model
        self._max_tokens = max_tokens
        self._threads = ThreadPoolExecutor(CALLS, thread_name_prefix="generate")
        self.name = f"bedrock:{model}"

    async def answer(
        self,
        question: str,
        sources: Sequence[SourceText],
        query_vector: Vector | None = None,  # noqa: ARG002 - the port's; language models take text
    ) -> GeneratedAnswer:
        """See ``Generator``."""
        prompt = build_prompt(question, sources)
        text = await asyncio.get_running_loop().run_in_executor(self._threads, self._converse, prompt)
        return read_answer(text, sources)

    async def close(self) -> None:
        """See ``Generator``."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        self._client.close()

    def _converse(self, prompt: Prompt) -> str:
        try:
            response = self._client.converse(
                modelId=self._model,
                system=[{"text": prompt.system}],
                messages=[{"role": "user", "content": [{"text": prompt.user}]}],
                inferenceConfig={"maxTokens": self._max_tokens, "temperature": 0.0},
            )
        except ClientError as error:
            if error.response["Error"]["Code"] in _BUSY:
                raise GenerationThrottled(f"{self._model} is busy", retry_after_s=_DEFAULT_RETRY_AFTER_S) from error
            raise GenerationError(f"{self._model} refused: {error.response['Error']['Message']}") from error
        except BotoCoreError as error:
            raise GenerationError(f"{self._model} did not answer: {error}") from error
        if response["stopReason"] in {"guardrail_intervened", "content_filtered"}:
            raise GenerationError(f"{self._model} withheld its answer: {response['stopReason']}")
        return "".join(block.get("text", "") for block in response["output"]["message"]["content"])
