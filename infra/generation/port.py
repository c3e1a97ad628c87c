"""Port of generators."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from schemas.queries import Citation, GeneratedAnswer
from schemas.search import Vector

NO_ANSWER: Final = "The sources do not answer this question."
"""Text of an answer if the sources are not relevant to the question. It has no citations."""


class GenerationError(Exception):
    """No answer was generated."""


class AnswerWithheld(GenerationError):
    """The model declined to answer this question from these sources, or returned no text."""


class GenerationThrottled(GenerationError):
    """The provider rejects calls for now, whatever the question.

    Attributes:
        retry_after_s: seconds to wait, as the provider requests or by default.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class SourceText:
    """A source for the answer. Numbers start at 1; answers cite them."""

    number: int
    text: str
    title: str | None = None


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """A part of an answer: text, and citations that did not occur before."""

    text: str
    citations: tuple[Citation, ...] = ()


@dataclass(frozen=True, slots=True)
class Written:
    """The end of a stream: the complete answer, and token usage.

    Attributes:
        answer: text and citations of all parts.
        input_tokens: tokens that the model read; None if not reported, or without a model.
        output_tokens: tokens that the model generated; None likewise.
    """

    answer: GeneratedAnswer
    input_tokens: int | None = None
    output_tokens: int | None = None


class Generator(Protocol):
    """Generates answers from sources only."""

    @property
    def name(self) -> str:
        """Provider and model. Part of the cache key of answers."""
        ...

    async def answer(
        self, question: str, sources: Sequence[SourceText], query_vector: Vector | None = None
    ) -> GeneratedAnswer:
        """Generate an answer from the sources, best first. ``query_vector`` is the embedding of the question.

        Raises:
            GenerationThrottled: the provider rejects calls for now.
            GenerationError: no answer was generated.
        """
        ...

    def stream(
        self, question: str, sources: Sequence[SourceText], query_vector: Vector | None = None
    ) -> AsyncGenerator[AnswerPart | Written, None]:
        """Like ``answer``, in parts. The last item, and only that one, is ``Written``.

        Closing the iterator early cancels the generation at the provider. Errors may occur after some parts.
        """
        ...

    async def close(self) -> None:
        """Close connections. The generator cannot be used afterwards."""
        ...
