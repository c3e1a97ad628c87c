"""Which sentences of the sources answer a question, by the words they share. Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Final

from infra.generation.port import SourceText
from infra.generation.sentences import clean, split_sentences, words

MAX_SENTENCES: Final = 3

_LEAST_COVERAGE: Final = 0.3
"""Share of the question's weight that some sentence must have for the sources to count as relevant at all."""

_LEAST_GAIN: Final = 0.1
"""Share of the question's weight that each further sentence must add."""

_SOURCE_WEIGHT: Final = 0.3
"""A sentence stands in the light of its source: the words around it tell what "it" is."""

_LONG_WORDS: Final = 40
"""A sentence of more telling words shares words by chance."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sentence that shares words with the question.

    Attributes:
        source: number of its source.
        place: its place among all sentences.
        quote: the sentence as it stands in the source.
        text: the sentence as part of an answer.
        shared: the words it shares with the question.
        coverage: their share of the question's weight, 0 to 1.
        score: how well it answers; coverage and source together.
    """

    source: int
    place: int
    quote: str
    text: str
    shared: frozenset[str]
    coverage: float
    score: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """Candidates, best first, and the share of each question word."""

    candidates: tuple[Candidate, ...]
    shares: Mapping[str, float]


def rank_sentences(question: str, sources: Sequence[SourceText]) -> Ranking:
    """Weigh each sentence by the rarity of the question's words in it, rarity being taken over the sources alone."""
    asked = words(question)
    sentences = [(source, quote) for source in sources for quote in split_sentences(source.text)]
    held = [words(quote) for _, quote in sentences]
    shares = _shares(asked, held)
    lights = {source.number: _sum(shares, words(f"{source.title or ''} {source.text}")) for source in sources}
    candidates = []
    for place, ((source, quote), own) in enumerate(zip(sentences, held, strict=True)):
        shared = asked & own
        if not shared:
            continue
        coverage = _sum(shares, shared)
        score = coverage * min(1.0, _LONG_WORDS / len(own)) + _SOURCE_WEIGHT * lights[source.number]
        candidates.append(Candidate(source.number, place, quote, clean(quote), shared, coverage, score))
    candidates.sort(key=lambda candidate: (-candidate.score, candidate.place))
    return Ranking(tuple(candidates), shares)


def choose_sentences(ranking: Ranking) -> tuple[Candidate, ...]:
    """At most ``MAX_SENTENCES`` that together cover the question; none if none is relevant.

    A further sentence must add words of the question that the ones before it lack. The best one's source comes first;
    within a source, sentences keep its order.
    """
    if all(candidate.coverage < _LEAST_COVERAGE for candidate in ranking.candidates):
        return ()
    chosen: list[Candidate] = []
    seen: set[str] = set()
    for candidate in ranking.candidates:
        if chosen and _sum(ranking.shares, candidate.shared - seen) < _LEAST_GAIN:
            continue
        chosen.append(candidate)
        seen |= candidate.shared
        if len(chosen) == MAX_SENTENCES:
            break
    return tuple(sorted(chosen, key=lambda pick: (pick.source != chosen[0].source, pick.place)))


def _shares(asked: frozenset[str], held: Sequence[frozenset[str]]) -> dict[str, float]:
    counts = Counter(word for own in held for word in own & asked)
    # A word that is in no sentence weighs most: what the sources do not know of counts against them.
    weights = {word: 1 + log((1 + len(held)) / (1 + counts[word])) for word in sorted(asked)}
    total = sum(weights.values())
    return {word: weight / total for word, weight in weights.items()}


def _sum(shares: Mapping[str, float], held: Iterable[str]) -> float:
    # Sorted, because the order of a set differs from process to process and sums of floats with it.
    return sum(shares[word] for word in sorted(held) if word in shares)
