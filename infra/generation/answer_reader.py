"""Incremental reading of a language model's answer. Pure."""

import re
from collections.abc import Iterator, Sequence
from typing import Final

from infra.generation.port import NO_ANSWER, AnswerPart, AnswerWithheld, SourceText
from infra.generation.sentences import split_sentences, words
from schemas.queries import Citation, GeneratedAnswer

_CITED: Final = re.compile(r"\[(\d{1,4}(?:\s*,\s*\d{1,4})*)\]")
_NUMBER: Final = re.compile(r"\d+")
_OPEN: Final = re.compile(r"\[[\d,\s]*")
_MAX_QUOTE_CHARS: Final = 300


class AnswerReader:
    """Reads an answer in arbitrary pieces and resolves its citations.

    ``[2]``, ``[1][3]`` and ``[1, 3]`` are citations; unknown numbers are removed from the text. A model cites a source
    as a whole: the quote is the sentence of the source that shares most words with the citing sentence. White space
    around the answer is removed.

    Args:
        sources: sources of the prompt.
    """

    def __init__(self, sources: Sequence[SourceText]) -> None:
        self._sources = {source.number: source for source in sources}
        self._text: list[str] = []
        self._citations: dict[tuple[int, str], Citation] = {}
        self._held = self._blanks = ""
        self._claim = self._since_cited = ""

    @property
    def answer(self) -> GeneratedAnswer:
        """The answer read so far."""
        return GeneratedAnswer("".join(self._text), tuple(self._citations.values()))

    def read(self, piece: str) -> AnswerPart:
        """Read the next piece; returns the part of the answer that is final now."""
        held = self._held + piece
        bracket = held.rfind("[")
        # A possible citation is held until it is complete, with the spaces before it, which may have to be removed.
        decided = held[:bracket] if bracket >= 0 and _OPEN.fullmatch(held, bracket) else held
        ready = decided.rstrip()
        self._held = held[len(ready) :]
        return self._part(ready)

    def end(self) -> AnswerPart:
        """End the answer; returns the rest of it.

        Raises:
            AnswerWithheld: the answer has no text.
        """
        ready, self._held = self._held.rstrip(), ""
        part = self._part(ready)
        if not self._text:
            raise AnswerWithheld("the model's answer was empty")
        return part

    def _part(self, ready: str) -> AnswerPart:
        known = len(self._citations)
        resolved = self._blanks + "".join(self._resolved(ready))
        text = resolved.rstrip()
        self._blanks = resolved[len(text) :]
        if not self._text:
            text = text.lstrip()
        if text:
            self._text.append(text)
        return AnswerPart(text, tuple(self._citations.values())[known:])

    def _resolved(self, ready: str) -> Iterator[str]:
        end = 0
        for match in _CITED.finditer(ready):
            before = ready[end : match.start()]
            self._since_cited += before
            if self._since_cited.strip():
                self._claim = self._since_cited
            self._since_cited = ""
            numbers = [number for number in map(int, _NUMBER.findall(match[1])) if number in self._sources]
            for number in numbers:
                quote = _quote(self._sources[number], self._claim)
                self._citations.setdefault((number, quote), Citation(source=number, quote=quote))
            yield before if numbers else before.rstrip(" ")
            yield from (f"[{number}]" for number in numbers)
            end = match.end()
        self._since_cited += ready[end:]
        yield ready[end:]


def read_answer(text: str, sources: Sequence[SourceText]) -> GeneratedAnswer:
    """Read a complete answer.

    Raises:
        AnswerWithheld: the answer has no text.
    """
    if text.strip() == NO_ANSWER:
        return GeneratedAnswer(NO_ANSWER)
    reader = AnswerReader(sources)
    reader.read(text)
    reader.end()
    return reader.answer


def _quote(source: SourceText, claim: str) -> str:
    claimed = words(claim)
    sentences = split_sentences(source.text) or [source.text.strip()[:_MAX_QUOTE_CHARS]]
    return max(sentences, key=lambda sentence: len(claimed & words(sentence)))
