"""A language model behind any endpoint that speaks OpenAI's chat completions."""

from collections.abc import Sequence
from typing import Final

import httpx
from pydantic import SecretStr, ValidationError

from infra.embedding.port import Vector
from infra.generation.port import GeneratedAnswer, GenerationError, GenerationThrottled, SourceText
from infra.generation.prompt import build_prompt, read_answer
from schemas.models import Message

_BUSY: Final = frozenset({httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE})
_DEFAULT_RETRY_AFTER_S: Final = 1.0
_CONNECT_TIMEOUT_S: Final = 3.0


class _Reply(Message):
    content: str | None = None


class _Choice(Message):
    message: _Reply


class _Completion(Message):
    choices: tuple[_Choice, ...]


class OpenAIGenerator:
    """Any OpenAI-compatible model.

    Args:
        base_url: what stands before ``/chat/completions``, such as ``http://127.0.0.1:8000/v1``.
        model: model id there.
        api_key: sent as bearer token, if there is one.
        max_tokens: longest answer.
        timeout_s: longest wait for an answer.
    """

    def __init__(
        self, base_url: str, model: str, *, api_key: SecretStr | None, max_tokens: int, timeout_s: float
    ) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._client = httpx.AsyncClient(
            base_url=base_url,
            headers={"Authorization": f"Bearer {api_key.get_secret_value()}"} if api_key else None,
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S)),
        )
        self.name = f"openai:{model}"

    async def answer(
        self,
        question: str,
        sources: Sequence[SourceText],
        query_vector: Vector | None = None,  # noqa: ARG002 - the port's; language models take text
    ) -> GeneratedAnswer:
        """See ``Generator``."""
        prompt = build_prompt(question, sources)
        request = {
            "model": self._model,
            "messages": [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}],
            "max_tokens": self._max_tokens,
            "temperature": 0,
        }
        try:
            response = await self._client.post("chat/completions", json=request)
        except httpx.HTTPError as error:
            raise GenerationError(f"{self._model} did not answer: {type(error).__name__} {error}") from error
        if response.status_code in _BUSY:
            raise GenerationThrottled(f"{self._model} is busy", retry_after_s=_retry_after_s(response))
        if not response.is_success:
            # The body stays out of the message: some servers repeat the key in it.
            raise GenerationError(f"{self._model} refused with status {response.status_code}")
        try:
            choice = _Completion.model_validate_json(response.content).choices[0]
        except (ValidationError, IndexError) as error:
            raise GenerationError(f"{self._model} answered with no chat completion") from error
        return read_answer(choice.message.content or "", sources)

    async def close(self) -> None:
        """See ``Generator``."""
        await self._client.aclose()


def _retry_after_s(response: httpx.Response) -> float:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isdecimal() else _DEFAULT_RETRY_AFTER_S
