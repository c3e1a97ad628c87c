"""What the rest of Freshline knows of generators."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from schemas.queries import Citation, GeneratedAnswer
from schemas.search import Vector

NO_ANSWER: Final = "The sources do not answer this question."
"""The whole text of an answer where the sources hold nothing that bears on the question; it has no citations."""


class GenerationError(Exception):
    """No answer was written."""


class AnswerWithheld(GenerationError):
    """The model would not answer this question from these sources, or said nothing; others it may answer."""


class GenerationThrottled(GenerationError):
    """The provider takes no more for now; nothing is wrong with the question.

    Attributes:
        retry_after_s: when to come back; the provider's word, or a guess where it gave none.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class SourceText:
    """A result to answer from, numbered from 1 as the answer cites it."""

    number: int
    text: str
    title: str | None = None


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """Some more of an answer: its text, and the citations that are new with it."""

    text: str
    citations: tuple[Citation, ...] = ()


@dataclass(frozen=True, slots=True)
class Written:
    """The end of a stream: the answer as a whole, and what it has cost.

    Attributes:
        answer: its text is that of all parts, its citations are those of all parts.
        input_tokens: read by the model; None where it does not tell, or is none.
        output_tokens: written by it.
    """

    answer: GeneratedAnswer
    input_tokens: int | None = None
    output_tokens: int | None = None


class Generator(Protocol):
    """Writes an answer that stands on the sources and on nothing else."""

    @property
    def name(self) -> str:
        """What writes, model included: answers of different names never share a cache entry."""
        ...

    async def answer(
        self, question: str, sources: Sequence[SourceText], query_vector: Vector | None = None
    ) -> GeneratedAnswer:
        """Answer from the sources, best first; ``query_vector`` is the question's, for those that compare vectors.

        Raises:
            GenerationThrottled: come back later.
            GenerationError: no answer was written.
        """
        ...

    def stream(
        self, question: str, sources: Sequence[SourceText], query_vector: Vector | None = None
    ) -> AsyncGenerator[AnswerPart | Written, None]:
        """The same, part by part as it is written; the last item, and only that one, is ``Written``.

        Closing it early ends the work, at the provider too. Raises as ``answer`` does, in the midst too.
        """
        ...

    async def close(self) -> None:
        """Free connections; the generator is not usable afterwards."""
        ...
