"""The generator without a model: it answers in the sources' own sentences."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Final

from typing_extensions import override

from infra.embedding.port import Embedder
from infra.generation.port import NO_ANSWER, AnswerPart, Generator, SourceText, Written
from infra.generation.ranking import Ranking, choose_sentences, rank_sentences
from schemas.queries import Citation, GeneratedAnswer
from schemas.search import Vector

_COMPARED: Final = 8
"""Best sentences whose vectors are compared: each costs a run of the model."""

_LIKENESS_WEIGHT: Final = 0.5


class ExtractiveGenerator(Generator):
    """Picks the one to three sentences that answer best; the same answer for the same sources, always.

    Args:
        embedder: if given, the best sentences by words are ordered by likeness to the question's vector as well, at the
            price of embedding them. Whether the sources are relevant is for the words to say.
    """

    name = "extractive"

    def __init__(self, embedder: Embedder | None = None) -> None:
        self._embedder = embedder

    @override
    async def answer(
        self, question: str, sources: Sequence[SourceText], query_vector: Vector | None = None
    ) -> GeneratedAnswer:
        parts = await self._parts(question, sources, query_vector)
        return _whole(parts)

    @override
    async def stream(
        self, question: str, sources: Sequence[SourceText], query_vector: Vector | None = None
    ) -> AsyncGenerator[AnswerPart | Written, None]:
        """See ``Generator``; each sentence is a part."""
        parts = await self._parts(question, sources, query_vector)
        for part in parts:
            yield part
        yield Written(_whole(parts))

    async def _parts(
        self, question: str, sources: Sequence[SourceText], query_vector: Vector | None
    ) -> tuple[AnswerPart, ...]:
        ranking = rank_sentences(question, sources)
        if self._embedder and query_vector is not None and ranking.candidates:
            ranking = await _order_by_likeness(ranking, self._embedder, query_vector)
        picks = choose_sentences(ranking)
        if not picks:
            return (AnswerPart(NO_ANSWER),)
        return tuple(
            AnswerPart(
                f"{' ' if place else ''}{pick.text} [{pick.source}]", (Citation(source=pick.source, quote=pick.quote),)
            )
            for place, pick in enumerate(picks)
        )

    @override
    async def close(self) -> None:
        """See ``Generator``. The embedder belongs to whoever opened it."""


def _whole(parts: Sequence[AnswerPart]) -> GeneratedAnswer:
    return GeneratedAnswer(
        "".join(part.text for part in parts), tuple(citation for part in parts for citation in part.citations)
    )


async def _order_by_likeness(ranking: Ranking, embedder: Embedder, query_vector: Vector) -> Ranking:
    compared = ranking.candidates[:_COMPARED]
    likeness = await embedder.embed_passages([candidate.text for candidate in compared]) @ query_vector
    # Models differ in what they call alike; only the spread within these sentences tells.
    spread = float(likeness.max() - likeness.min()) or 1.0
    scored = [
        replace(candidate, score=candidate.score + _LIKENESS_WEIGHT * float(like - likeness.min()) / spread)
        for candidate, like in zip(compared, likeness, strict=True)
    ]
    scored.sort(key=lambda candidate: (-candidate.score, candidate.place))
    return Ranking((*scored, *ranking.candidates[_COMPARED:]), ranking.shares)
