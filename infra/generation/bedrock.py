"""A language model on Amazon Bedrock, through its Converse API."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from typing_extensions import override
from urllib3.exceptions import HTTPError as Urllib3Error

from infra.generation.port import AnswerPart, AnswerWithheld, GenerationError, GenerationThrottled, SourceText, Written
from infra.generation.prompt import Prompt, build_prompt
from infra.generation.reading import AnswerReader, read_answer
from schemas.queries import GeneratedAnswer
from schemas.search import Vector

if TYPE_CHECKING:
    from mypy_boto3_bedrock_runtime import BedrockRuntimeClient

CALLS: Final = 16
"""Answers written at a time by one process."""

_BUSY: Final = frozenset(
    {
        "ThrottlingException",
        "ServiceUnavailableException",
        "ModelNotReadyException",
        # The same in the midst of a stream, where names begin small.
        "throttlingException",
        "serviceUnavailableException",
    }
)
_WITHHELD: Final = frozenset({"guardrail_intervened", "content_filtered"})
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


class BedrockGenerator(Generator):
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
        """See ``Generator``. The client blocks, so a thread reads; when this is closed it ends with the next event."""
        reader = AnswerReader(sources)
        usage: Mapping[str, int] = {}
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Any] = asyncio.Queue()
        unwanted = threading.Event()

        def read() -> None:
            try:
                with closing(self._converse_stream(build_prompt(question, sources))) as stream:
                    for event in stream:
                        if unwanted.is_set():
                            return
                        loop.call_soon_threadsafe(events.put_nowait, event)
            finally:
                with suppress(RuntimeError):  # a loop that is closed waits for nothing
                    loop.call_soon_threadsafe(events.put_nowait, None)

        reading = loop.run_in_executor(self._threads, read)
        try:
            while (event := await events.get()) is not None:
                if text := event.get("contentBlockDelta", {}).get("delta", {}).get("text"):
                    yield reader.read(text)
                if stop := event.get("messageStop"):
                    self._check(stop["stopReason"])
                usage = event.get("metadata", {}).get("usage", usage)
            await reading  # raises what ended it
        finally:
            unwanted.set()
            reading.cancel()  # where it has not begun
        yield reader.end()
        yield Written(reader.answer, usage.get("inputTokens"), usage.get("outputTokens"))

    @override
    async def close(self) -> None:
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        self._client.close()

    def _converse(self, prompt: Prompt) -> str:
        with self._failures_said():
            response = self._client.converse(**self._request(prompt))
        self._check(response["stopReason"])
        return "".join(block.get("text", "") for block in response["output"]["message"]["content"])

    def _converse_stream(self, prompt: Prompt) -> Generator[Mapping[str, Any], None, None]:
        with self._failures_said(), closing(self._client.converse_stream(**self._request(prompt))["stream"]) as stream:
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
    def _failures_said(self) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            if error.response["Error"]["Code"] in _BUSY:
                raise GenerationThrottled(f"{self._model} is busy", retry_after_s=_DEFAULT_RETRY_AFTER_S) from error
            raise GenerationError(f"{self._model} refused: {error.response['Error']['Message']}") from error
        except (BotoCoreError, Urllib3Error) as error:
            raise GenerationError(f"{self._model} did not answer: {error}") from error
