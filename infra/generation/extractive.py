"""Generator without a language model: answers consist of sentences of the sources."""

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
"""Number of best sentences whose vectors are compared. Each takes a run of the model."""

_SIMILARITY_WEIGHT: Final = 0.5


class ExtractiveGenerator(Generator):
    """Selects the one to three sentences that answer best. Deterministic.

    Args:
        embedder: if given, the best sentences by words are also ranked by similarity to the question's vector, which
            requires embedding them. Relevance of the sources is decided by words only. Closed by the caller.
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

        parts = await self._parts(question, sources, query_vector)
        for part in parts:
            yield part
        yield Written(_whole(parts))

    async def _parts(
        self, question: str, sources: Sequence[SourceText], query_vector: Vector | None
    ) -> tuple[AnswerPart, ...]:
        ranking = rank_sentences(question, sources)
        if self._embedder and query_vector is not None and ranking.candidates:
            ranking = await _rank_by_similarity(ranking, self._embedder, query_vector)
        picks = choose_sentences(ranking)
        if not picks:
            return (AnswerPart(NO_ANSWER),)
        return tuple(
            AnswerPart(
                f"{' ' if number else ''}{pick.text} [{pick.source}]", (Citation(source=pick.source, quote=pick.quote),)
            )
            for number, pick in enumerate(picks)
        )

    @override
    async def close(self) -> None:
        pass  # the embedder is closed by the caller


def _whole(parts: Sequence[AnswerPart]) -> GeneratedAnswer:
    return GeneratedAnswer(
        "".join(part.text for part in parts), tuple(citation for part in parts for citation in part.citations)
    )


async def _rank_by_similarity(ranking: Ranking, embedder: Embedder, query_vector: Vector) -> Ranking:
    compared = ranking.candidates[:_COMPARED]
    similarities = await embedder.embed_passages([candidate.text for candidate in compared]) @ query_vector
    # The range of similarities differs between models, so they are normalized over these sentences.
    spread = float(similarities.max() - similarities.min()) or 1.0
    scored = [
        replace(candidate, score=candidate.score + _SIMILARITY_WEIGHT * float(similarity - similarities.min()) / spread)
        for candidate, similarity in zip(compared, similarities, strict=True)
    ]
    scored.sort(key=lambda candidate: (-candidate.score, candidate.index))
    return Ranking((*scored, *ranking.candidates[_COMPARED:]), ranking.weights)
