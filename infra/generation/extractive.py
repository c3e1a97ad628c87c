"""The generator without a model: it answers in the sources' own sentences."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from infra.embedding.port import Embedder, Vector
from infra.generation.port import NO_ANSWER, GeneratedAnswer, SourceText
from infra.generation.ranking import Ranking, choose_sentences, rank_sentences
from schemas.queries import Citation

_COMPARED: Final = 8
"""Best sentences whose vectors are compared: each costs a run of the model."""

_LIKENESS_WEIGHT: Final = 0.5


class ExtractiveGenerator:
    """Picks the one to three sentences that answer best; the same answer for the same sources, always.

    Args:
        embedder: if given, the best sentences by words are ordered by likeness to the question's vector as well, at the
            price of embedding them. Whether the sources are relevant is for the words to say.
    """

    name = "extractive"

    def __init__(self, embedder: Embedder | None = None) -> None:
        self._embedder = embedder

    async def answer(
        self, question: str, sources: Sequence[SourceText], query_vector: Vector | None = None
    ) -> GeneratedAnswer:
        """See ``Generator``."""
        ranking = rank_sentences(question, sources)
        if self._embedder and query_vector is not None and ranking.candidates:
            ranking = await _order_by_likeness(ranking, self._embedder, query_vector)
        picks = choose_sentences(ranking)
        if not picks:
            return GeneratedAnswer(NO_ANSWER)
        return GeneratedAnswer(
            " ".join(f"{pick.text} [{pick.source}]" for pick in picks),
            tuple(Citation(source=pick.source, quote=pick.quote) for pick in picks),
        )

    async def close(self) -> None:
        """See ``Generator``. The embedder belongs to whoever opened it."""


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
