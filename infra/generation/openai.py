"""Language models with the chat completions API of OpenAI."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, Final

import httpx
from pydantic import SecretStr, ValidationError
from typing_extensions import override

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
from infra.generation.prompt import build_prompt
from schemas.models import Message
from schemas.queries import GeneratedAnswer
from schemas.search import Vector

_BUSY: Final = frozenset({httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE})
_DEFAULT_RETRY_AFTER_S: Final = 1.0
_CONNECT_TIMEOUT_S: Final = 3.0
_WITHHELD: Final = "content_filter"
_DATA: Final = "data:"
_DONE: Final = "[DONE]"


class _Reply(Message):
    content: str | None = None


class _Choice(Message):
    message: _Reply = _Reply()
    delta: _Reply = _Reply()
    finish_reason: str | None = None


class _Usage(Message):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Completion(Message):
    choices: tuple[_Choice, ...]
    usage: _Usage | None = None


class OpenAIGenerator(Generator):
    """A model of any OpenAI-compatible endpoint.

    Args:
        base_url: URL without ``/chat/completions``, such as ``http://127.0.0.1:8000/v1``.
        model: id of the model.
        api_key: bearer token, or None.
        max_tokens: maximum length of an answer.
        timeout_s: timeout of an answer.
    """

    def __init__(
        self, base_url: str, model: str, *, api_key: SecretStr | None, max_tokens: int, timeout_s: float
    ) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._timeout_s = timeout_s
        self._client = httpx.AsyncClient(
            base_url=base_url,
            headers={"Authorization": f"Bearer {api_key.get_secret_value()}"} if api_key else None,
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S)),
        )

    @property
    @override
    def name(self) -> str:
        return f"openai:{self._model}"

    @override
    async def answer(
        self,
        question: str,
        sources: Sequence[SourceText],
        query_vector: Vector | None = None,
    ) -> GeneratedAnswer:
        with self._provider_errors():
            response = await self._client.post("chat/completions", json=self._request(question, sources))
        self._check(response)
        choice = self._choice(self._completion(response.content))
        if choice is None:
            raise GenerationError(f"{self._model} returned no chat completion")
        return read_answer(choice.message.content or "", sources)

    @override
    async def stream(
        self,
        question: str,
        sources: Sequence[SourceText],
        query_vector: Vector | None = None,
    ) -> AsyncGenerator[AnswerPart | Written, None]:
        # Closing the generator closes the connection, which cancels the generation at these endpoints.
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        reader, usage = AnswerReader(sources), _Usage()
        with self._provider_errors():
            async with asyncio.timeout(self._timeout_s):
                request = self._request(question, sources) | streaming
                async with self._client.stream("POST", "chat/completions", json=request) as response:
                    self._check(response)
                    async with aclosing(_events(response)) as events:
                        async for event in events:
                            completion = self._completion(event)
                            usage = completion.usage or usage
                            choice = self._choice(completion)
                            if choice is not None and choice.delta.content:
                                yield reader.read(choice.delta.content)
        yield reader.end()
        yield Written(reader.answer, usage.prompt_tokens, usage.completion_tokens)

    @override
    async def close(self) -> None:
        await self._client.aclose()

    def _request(self, question: str, sources: Sequence[SourceText]) -> dict[str, Any]:
        prompt = build_prompt(question, sources)
        return {
            "model": self._model,
            "messages": [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}],
            "max_tokens": self._max_tokens,
            "temperature": 0,
        }

    @contextmanager
    def _provider_errors(self) -> Iterator[None]:
        try:
            yield
        except (httpx.HTTPError, TimeoutError) as error:
            raise GenerationError(f"{self._model} did not respond: {type(error).__name__} {error}") from error

    def _check(self, response: httpx.Response) -> None:
        if response.status_code in _BUSY:
            raise GenerationThrottled(f"{self._model} throttled the call", retry_after_s=_retry_after_s(response))
        if not response.is_success:
            # Without the body: some servers include the key in it.
            raise GenerationError(f"{self._model} responded with status {response.status_code}")

    def _completion(self, body: bytes | str) -> _Completion:
        try:
            return _Completion.model_validate_json(body)
        except ValidationError as error:
            raise GenerationError(f"{self._model} returned no chat completion") from error

    def _choice(self, completion: _Completion) -> _Choice | None:
        """The choice of a completion; None for the event that reports token usage."""
        choice = next(iter(completion.choices), None)
        if choice is not None and choice.finish_reason == _WITHHELD:
            raise AnswerWithheld(f"{self._model} withheld its answer: {_WITHHELD}")
        return choice


async def _events(response: httpx.Response) -> AsyncGenerator[str, None]:
    """Data of each server-sent event. These endpoints send one line per event."""
    async for line in response.aiter_lines():
        data = line.removeprefix(_DATA).strip() if line.startswith(_DATA) else ""
        if data == _DONE:
            return
        if data:
            yield data
    raise httpx.RemoteProtocolError("the stream ended before its last event")


def _retry_after_s(response: httpx.Response) -> float:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isdecimal() else _DEFAULT_RETRY_AFTER_S
