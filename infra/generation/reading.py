"""How a language model's answer is read while it is being written. Pure."""

import re
from collections.abc import Iterator, Sequence
from typing import Final

from infra.generation.port import NO_ANSWER, AnswerPart, AnswerWithheld, SourceText
from infra.generation.sentences import split_sentences, words
from schemas.queries import Citation, GeneratedAnswer

_CITED: Final = re.compile(r"\[(\d{1,4}(?:\s*,\s*\d{1,4})*)\]")
_NUMBER: Final = re.compile(r"\d+")
_OPEN: Final = re.compile(r"\[[\d,\s]*")
_LONGEST_QUOTE: Final = 300


class AnswerReader:
    """Reads an answer piece by piece, however it is cut, and finds what it cites.

    ``[2]``, ``[1][3]`` and ``[1, 3]`` cite; a number that no source has is taken out of the text. A model cites a
    source, not a place in it: the quote is the source's sentence that shares most words with the sentence that cites
    it. Blanks around the answer are left out.

    Args:
        sources: what the model was given.
    """

    def __init__(self, sources: Sequence[SourceText]) -> None:
        self._sources = {source.number: source for source in sources}
        self._text: list[str] = []
        self._citations: dict[tuple[int, str], Citation] = {}
        self._held = self._blanks = ""
        self._claim = self._since_cited = ""

    @property
    def answer(self) -> GeneratedAnswer:
        """What was read so far."""
        return GeneratedAnswer("".join(self._text), tuple(self._citations.values()))

    def read(self, piece: str) -> AnswerPart:
        """Take the next piece; what is sure of the answer now."""
        held = self._held + piece
        bracket = held.rfind("[")
        # What may become a citation waits for its end, and with it the blanks that go where a citation is taken out.
        decided = held[:bracket] if bracket >= 0 and _OPEN.fullmatch(held, bracket) else held
        ready = decided.rstrip()
        self._held = held[len(ready) :]
        return self._part(ready)

    def end(self) -> AnswerPart:
        """Take it that the answer ends here; what was not sure before.

        Raises:
            AnswerWithheld: there is no text in it.
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
    """Read an answer that is there as a whole.

    Raises:
        AnswerWithheld: there is no text in it.
    """
    if text.strip() == NO_ANSWER:
        return GeneratedAnswer(NO_ANSWER)
    reader = AnswerReader(sources)
    reader.read(text)
    reader.end()
    return reader.answer


def _quote(source: SourceText, claim: str) -> str:
    claimed = words(claim)
    sentences = split_sentences(source.text) or [source.text.strip()[:_LONGEST_QUOTE]]
    return max(sentences, key=lambda sentence: len(claimed & words(sentence)))
