"""Ranking of sentences by the words that they share with a question. Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Final

from infra.generation.port import SourceText
from infra.generation.sentences import clean, split_sentences, words

MAX_SENTENCES: Final = 3

_MIN_COVERAGE: Final = 0.3
"""Minimum coverage of the best sentence for the sources to be relevant."""

_MIN_GAIN: Final = 0.1
"""Minimum coverage that each further sentence adds."""

_SOURCE_WEIGHT: Final = 0.3
"""Weight of the coverage of the source: its other sentences define pronouns and subjects."""

_LONG_WORDS: Final = 40
"""Sentences with more significant words are penalized, because they share words by chance."""


@dataclass(frozen=True, slots=True)
class RankedSentence:
    """A sentence that shares words with the question.

    Attributes:
        source: number of its source.
        index: index among all sentences.
        quote: the sentence as in the source.
        text: the sentence as part of an answer.
        shared: words that it shares with the question.
        coverage: fraction of the question's weight that these words have.
        score: rank score, from coverage of sentence and source.
    """

    source: int
    index: int
    quote: str
    text: str
    shared: frozenset[str]
    coverage: float
    score: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """Sentences, best first, and the weight of each question word; the weights add up to 1."""

    candidates: tuple[RankedSentence, ...]
    weights: Mapping[str, float]


def rank_sentences(question: str, sources: Sequence[SourceText]) -> Ranking:
    """Rank sentences by the question words that they contain, weighted by their rarity within the sources."""
    asked = words(question)
    sentences = [(source, quote) for source in sources for quote in split_sentences(source.text)]
    sentence_words = [words(quote) for _, quote in sentences]
    weights = _weights(asked, sentence_words)
    source_coverage = {source.number: _sum(weights, words(f"{source.title or ''} {source.text}")) for source in sources}
    candidates = []
    for index, ((source, quote), own) in enumerate(zip(sentences, sentence_words, strict=True)):
        shared = asked & own
        if not shared:
            continue
        coverage = _sum(weights, shared)
        score = coverage * min(1.0, _LONG_WORDS / len(own)) + _SOURCE_WEIGHT * source_coverage[source.number]
        candidates.append(RankedSentence(source.number, index, quote, clean(quote), shared, coverage, score))
    candidates.sort(key=lambda candidate: (-candidate.score, candidate.index))
    return Ranking(tuple(candidates), weights)


def choose_sentences(ranking: Ranking) -> tuple[RankedSentence, ...]:
    """Choose up to ``MAX_SENTENCES`` that together cover the question; none if no sentence is relevant.

    Each further sentence must add question words. The source of the best sentence is first; sentences of a source keep
    their order.
    """
    if all(candidate.coverage < _MIN_COVERAGE for candidate in ranking.candidates):
        return ()
    chosen: list[RankedSentence] = []
    seen: set[str] = set()
    for candidate in ranking.candidates:
        if chosen and _sum(ranking.weights, candidate.shared - seen) < _MIN_GAIN:
            continue
        chosen.append(candidate)
        seen |= candidate.shared
        if len(chosen) == MAX_SENTENCES:
            break
    return tuple(sorted(chosen, key=lambda pick: (pick.source != chosen[0].source, pick.index)))


def _weights(asked: frozenset[str], sentence_words: Sequence[frozenset[str]]) -> dict[str, float]:
    counts = Counter(word for own in sentence_words for word in own & asked)
    # Words that no sentence contains have the highest weight, so they reduce the coverage of all sentences.
    weights = {word: 1 + log((1 + len(sentence_words)) / (1 + counts[word])) for word in sorted(asked)}
    total = sum(weights.values())
    return {word: weight / total for word, weight in weights.items()}


def _sum(weights: Mapping[str, float], present: Iterable[str]) -> float:
    # Sorted, because the order of a set differs between processes, and with it the rounding of the sum.
    return sum(weights[word] for word in sorted(present) if word in weights)
