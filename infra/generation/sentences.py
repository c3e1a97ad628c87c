"""Sentences of Markdown texts and their significant words. Pure."""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Final

_SKIPPED: Final = re.compile(
    r"""  \#{1,6}\s               # a heading
        | (?=.*---) [\s:|-]+ $    # a rule, or the delimiter row of a table
        | <!--
    """,
    re.VERBOSE,
)
_FENCES: Final = ("```", "~~~")
_MARKER: Final = re.compile(r"\s*(?:>\s?)*(?:(?:[-*+]|\d{1,3}[.)])\s+(?:\[[ xX]\]\s+)?)?")
_CLOSING: Final = "\"')*_`\u201d\u2019"
# The lookbehind avoids quadratic time for long rows of dots, as in tables of contents.
_END: Final = re.compile(rf"(?<![.!?])[.!?]+[{_CLOSING}]*\s+(?=[\"'(\[*_`\u201c\u2018]*[A-Z0-9])")
_ABBREVIATED: Final = re.compile(
    r"\b(?:[A-Za-z]|e\.g|i\.e|vs|cf|al|Dr|Mr|Mrs|Ms|St|Nos?|[Ff]igs?|Inc|Ltd|Corp|approx|dept)\.$"
)
_LINK: Final = re.compile(r"(!?)\[([^\[\]]*)\]\([^()\s]*(?:\s+\"[^\"]*\")?\)")
_NUMBER_IN_BRACKETS: Final = re.compile(r"\[(\d[\d,\s]*)\]")
_PAIRED: Final = ("**", "__", "`")

_WORD: Final = re.compile(r"[^\W_]+")
_COMMON: Final = frozenset(
    """a about after all also am an and any are as at be been before being both but by can could did do does done each
    for from get gets give go had has have having he her here his how i if in into is it its just let like many may me
    might more most much must my no nor not of on once only or our out over own s same shall she should so some such t
    tell than that the their them then there these they this those through to too under until up us very was we were
    what when where which while who whom whose why will with would you your""".split()  # noqa: SIM905 - a list would take a page
)


def split_sentences(text: str) -> list[str]:
    """Sentences, list items and table rows of a Markdown text, verbatim. Headings and code are omitted."""
    return [sentence for block in _blocks(text) for sentence in _sentences(block)]


def clean(sentence: str) -> str:
    """Convert a sentence for use in an answer: one line, with final punctuation, without unbalanced markup."""
    if _is_row(sentence):
        sentence = ", ".join(cell.strip() for cell in sentence.strip().strip("|").split("|") if cell.strip())
    sentence = _LINK.sub(lambda link: "" if link[1] else link[2], sentence)
    # A number in brackets would be interpreted as a citation.
    sentence = _NUMBER_IN_BRACKETS.sub(r"(\1)", sentence)
    for mark in _PAIRED:
        if sentence.count(mark) % 2:
            sentence = sentence.replace(mark, "")
    sentence = " ".join(sentence.split())
    return sentence + "." if sentence and not sentence.rstrip(_CLOSING).endswith((".", "!", "?", ":")) else sentence


def words(text: str) -> frozenset[str]:
    """Significant words of a text, stemmed; all of its words if none is significant."""
    found = _WORD.findall(text.lower())
    return frozenset(_stem(word) for word in found if word not in _COMMON) or frozenset(found)


def _blocks(text: str) -> Iterator[str]:
    """Paragraphs, list items and table rows, without their markers."""
    in_code = False
    start = end = position = 0
    for line in text.splitlines(keepends=True):
        body = line.lstrip()  # no pattern starts with spaces, of which a document may have many
        is_fence = body.startswith(_FENCES)
        is_outside = is_fence or in_code or not body or bool(_SKIPPED.match(body))
        in_code ^= is_fence
        marked = len(line) - len(_MARKER.sub("", line, count=1))
        if is_outside or line[:marked].strip() or _is_row(line) or _is_row(text[start:end]):
            if start < end:
                yield text[start:end]
            start = end = position
        if not is_outside:
            start = position + marked if start == end else start
            end = position + len(line)
        position += len(line)
    if start < end:
        yield text[start:end]


def _is_row(line: str) -> bool:
    stripped = line.strip()
    return len(stripped) > 1 and stripped[0] == stripped[-1] == "|"


def _sentences(block: str) -> Iterator[str]:
    start = 0
    for match in _END.finditer(block):
        if not _ABBREVIATED.search(block[start : match.end()].rstrip()):
            yield block[start : match.end()].strip()
            start = match.end()
    if rest := block[start:].strip():
        yield rest


@lru_cache(maxsize=32_768)
def _stem(word: str) -> str:
    """Remove the most common English suffixes, so that forms of a word are equal."""
    if word.endswith("ss"):
        return word
    for ending in ("ies", "ing", "ied", "es", "ed", "s", "y", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:  # noqa: PLR2004 - minimum length of a stem
            return word[: -len(ending)]
    return word
