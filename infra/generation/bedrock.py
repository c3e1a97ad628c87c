"""Language models on Amazon Bedrock, through the Converse API."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from collections.abc import Generator as SyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from typing_extensions import override
from urllib3.exceptions import HTTPError as Urllib3Error

from infra.generation.answer_reader import AnswerReader, read_answer
from infra.generation.port import (
    AnswerPart,
    AnswerWithheld,
    GenerationError,
    GenerationThrottled,
    Generator,
    SourceText,
    Written,
)
from infra.generation.prompt import Prompt, build_prompt
from schemas.queries import GeneratedAnswer
from schemas.search import Vector

if TYPE_CHECKING:
    from mypy_boto3_bedrock_runtime import BedrockRuntimeClient

CALLS: Final = 16
"""Concurrent generations of a process."""

_BUSY: Final = frozenset(
    {
        "ThrottlingException",
        "ServiceUnavailableException",
        "ModelNotReadyException",
        # Within a stream, names start in lower case.
        "throttlingException",
        "serviceUnavailableException",
    }
)
_WITHHELD: Final = frozenset({"guardrail_intervened", "content_filtered"})
_DEFAULT_RETRY_AFTER_S: Final = 1.0


def connect(region: str | None, *, timeout_s: float) -> "BedrockRuntimeClient":
    """A client with one retry only, because a client waits for the answer."""
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


class BedrockGenerator(Generator):
    """Any Bedrock model with the Converse API.

    Args:
        client: client with its own retries.
        model: id of the model or inference profile.
        max_tokens: maximum length of an answer.
    """

    def __init__(self, client: "BedrockRuntimeClient", model: str, *, max_tokens: int) -> None:
        self._client = client
        self._model = model
        self._max_tokens = max_tokens
        self._threads = ThreadPoolExecutor(CALLS, thread_name_prefix="generate")

    @property
    @override
    def name(self) -> str:
        return f"bedrock:{self._model}"

    @override
    async def answer(
        self,
        question: str,
        sources: Sequence[SourceText],
        query_vector: Vector | None = None,
    ) -> GeneratedAnswer:
        prompt = build_prompt(question, sources)
        text = await asyncio.get_running_loop().run_in_executor(self._threads, self._converse, prompt)
        return read_answer(text, sources)

    @override
    async def stream(
        self,
        question: str,
        sources: Sequence[SourceText],
        query_vector: Vector | None = None,
    ) -> AsyncGenerator[AnswerPart | Written, None]:
        # The client blocks, so a thread reads the events. After cancellation it ends with the next event.
        reader = AnswerReader(sources)
        usage: Mapping[str, int] = {}
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Any] = asyncio.Queue()
        cancelled = threading.Event()

        def read() -> None:
            try:
                with closing(self._converse_stream(build_prompt(question, sources))) as stream:
                    for event in stream:
                        if cancelled.is_set():
                            return
                        loop.call_soon_threadsafe(events.put_nowait, event)
            finally:
                with suppress(RuntimeError):  # the event loop is closed
                    loop.call_soon_threadsafe(events.put_nowait, None)

        reading = loop.run_in_executor(self._threads, read)
        try:
            while (event := await events.get()) is not None:
                if text := event.get("contentBlockDelta", {}).get("delta", {}).get("text"):
                    yield reader.read(text)
                if stop := event.get("messageStop"):
                    self._check(stop["stopReason"])
                usage = event.get("metadata", {}).get("usage", usage)
            await reading  # raises the error of the thread
        finally:
            cancelled.set()
            reading.cancel()  # if the thread has not started it
        yield reader.end()
        yield Written(reader.answer, usage.get("inputTokens"), usage.get("outputTokens"))

    @override
    async def close(self) -> None:
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        self._client.close()

    def _converse(self, prompt: Prompt) -> str:
        with self._provider_errors():
            response = self._client.converse(**self._request(prompt))
        self._check(response["stopReason"])
        return "".join(block.get("text", "") for block in response["output"]["message"]["content"])

    def _converse_stream(self, prompt: Prompt) -> SyncGenerator[Mapping[str, Any], None, None]:
        with (
            self._provider_errors(),
            closing(self._client.converse_stream(**self._request(prompt))["stream"]) as stream,
        ):
            yield from stream

    def _request(self, prompt: Prompt) -> dict[str, Any]:
        return {
            "modelId": self._model,
            "system": [{"text": prompt.system}],
            "messages": [{"role": "user", "content": [{"text": prompt.user}]}],
            "inferenceConfig": {"maxTokens": self._max_tokens, "temperature": 0.0},
        }

    def _check(self, stop_reason: str) -> None:
        if stop_reason in _WITHHELD:
            raise AnswerWithheld(f"{self._model} withheld its answer: {stop_reason}")

    @contextmanager
    def _provider_errors(self) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            if error.response["Error"]["Code"] in _BUSY:
                raise GenerationThrottled(
                    f"{self._model} throttled the call", retry_after_s=_DEFAULT_RETRY_AFTER_S
                ) from error
            raise GenerationError(f"{self._model} rejected the call: {error.response['Error']['Message']}") from error
        except (BotoCoreError, Urllib3Error) as error:
            raise GenerationError(f"{self._model} did not respond: {error}") from error
