"""From a parsed document to passages that are good to find and cheap to keep.

One rule: a stretch that is too long is cut in two at its most important boundary (the highest heading, else between
paragraphs, list items, lines, sentences), and each half again. Among equals a hash of the words that follow decides.
So where the cuts lie depends on what is written there, not on how much text comes before, and an edit moves only the
cuts next to it. Filling passages one after the other instead would move all that follow.

Passages that an edit leaves alone keep their ``text_sha256``, and are not embedded again. Whether they are written
again depends on all that is stored of them; see ``chunk_identity``.
"""

import re
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import accumulate, pairwise
from typing import Final

from tokenizers import Tokenizer

from schemas.events import PlannedChunk
from schemas.index import StoredChunk

SPLITTER_VERSION: Final = "split-2"
"""Part of the profile: changes whenever the same document would be split, described or identified otherwise."""

MAX_CONTEXT_CHARS: Final = 300
"""Longest title and heading path put before a passage: some 75 tokens of English on top of the passage's own.

They are worth it. On a real handbook, with the titles of 124 edits as queries, the page edited came back with a mean
reciprocal rank of 0.56 instead of 0.48; 13 instead of 10 of 100 passages of an edited page had to be embedded again.
"""

_MARGIN: Final = 0.25
"""No half is smaller than this part of the whole, where a boundary allows it: keeps passages from being crumbs."""
_CHARS_PER_TOKEN: Final = 8
"""A passage is also as long as this many characters for each token: some tokenizers count a word of any length as one
unknown token."""
_COUNTS_KEPT: Final = 20_000
"""Blocks whose token counts are remembered, some 10 MB: most blocks of an edited document were counted before."""
_HASHED_CHARS: Final = 40

_HEADING: Final = re.compile(r" {0,3}(#{1,6})[ \t]+(.*)$")
_UNDERLINE: Final = re.compile(r" {0,3}(?:(=+)|-{3,})[ \t]*$")
_ITEM: Final = re.compile(r"[ \t]*(?:[-*+]|\d{1,9}[.)])[ \t]")
_FENCE: Final = re.compile(r" {0,3}(`{3,}|~{3,})")
_INNER: Final = re.compile(r".{30}.*?(?:\n+|(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])|\Z)", re.DOTALL)
"""Ends of lines and of sentences, also of Chinese and Japanese ones, at least 30 characters apart: a long text of tiny
lines must not become millions of pieces. The end of the text is one too, so that a search never fails late."""

_HIGHEST_HEADING: Final = 10
"""A heading of level n counts ``_HIGHEST_HEADING - n``: more than any boundary below."""
_PARAGRAPH: Final = 3
_ITEM_START: Final = 2
_LINE: Final = 1
_SENTENCE: Final = 0
_ANYWHERE: Final = -1
_AFTER_HEADING: Final = -2
"""A heading stays with what it announces."""


@dataclass(slots=True)
class _Piece:
    """A stretch that is not cut again.

    Attributes:
        start: first character.
        end: one past the last character, and the next piece's start.
        rank: how good a place to cut its start is.
        heading: level and text, if the piece starts with one.
        tokens: its length.
    """

    start: int
    end: int
    rank: int
    heading: tuple[int, str] | None = None
    tokens: int = 0


class Splitter:
    """Splits text into passages; for one tokenizer and one set of limits the same text is always split the same way.

    Args:
        tokenizer_json: content of the embedding model's ``tokenizer.json``.
        chunk_tokens: longest passage in tokens, special tokens included; ``embedding_text`` may add
            ``MAX_CONTEXT_CHARS`` characters.
        overlap_tokens: most tokens of the passage before that a passage repeats; at most half of ``chunk_tokens``.

    Raises:
        ValueError: the overlap leaves no room for text of a passage's own.
    """

    def __init__(self, tokenizer_json: str, chunk_tokens: int, overlap_tokens: int = 0) -> None:
        tokenizer = Tokenizer.from_str(tokenizer_json)
        # Files come with the limits their authors trained with; counting needs neither.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        room = chunk_tokens - tokenizer.num_special_tokens_to_add(is_pair=False) - overlap_tokens
        if overlap_tokens > chunk_tokens // 2 or room < 1:
            raise ValueError(
                f"overlap_tokens is {overlap_tokens}; it must be at most half of chunk_tokens {chunk_tokens}"
            )
        self._tokenizer = tokenizer

        @lru_cache(maxsize=_COUNTS_KEPT)
        def tokens(block: str) -> int:
            return len(tokenizer.encode_batch_fast([block], add_special_tokens=False)[0])

        self._tokens = tokens
        self._room = room
        self._overlap = overlap_tokens

    def split(self, text: str, title: str | None) -> list[PlannedChunk]:
        """Passages of ``text`` in order; together they hold all of it except white space.

        Args:
            text: parsed text, Markdown or plain, without lone surrogates.
            title: the document's title; it is embedded with each passage.
        """
        pieces = list(self._measured(text, _blocks(text)))
        paths = _heading_paths(pieces)
        chunks = []
        for first, end in self._groups(text, pieces):
            begin = self._with_overlap(pieces, first)
            passage = text[pieces[begin].start : pieces[end - 1].end]
            start = pieces[begin].start + len(passage) - len(passage.lstrip())
            passage = passage.strip()
            if passage:
                hashed = sha256(_in_context(title, paths[begin], passage).encode()).hexdigest()
                chunks.append(
                    PlannedChunk(
                        text=passage,
                        heading_path=paths[begin],
                        start=start,
                        end=start + len(passage),
                        text_sha256=hashed,
                    )
                )
        return chunks

    def _measured(self, text: str, blocks: Sequence[_Piece]) -> Iterator[_Piece]:
        """Count the tokens of ``blocks``, and take apart those that are too long."""
        for block, tokens in zip(blocks, self._count(text, blocks), strict=True):
            block.tokens = tokens
            if tokens <= self._room:
                yield block
            else:
                inner = _cut_up(block, (match.end() for match in _INNER.finditer(text, block.start, block.end)), text)
                yield from self._fitted(text, inner)

    def _fitted(self, text: str, pieces: Sequence[_Piece]) -> Iterator[_Piece]:
        for piece, tokens in zip(pieces, self._count(text, pieces), strict=True):
            piece.tokens = tokens
            if tokens <= self._room:
                yield piece
            else:
                # Nothing of a text's structure is left here: cut between words, else anywhere.
                rest = _cut_up(piece, self._filled(text, piece), text, rank=_ANYWHERE)
                for part, part_tokens in zip(rest, self._count(text, rest), strict=True):
                    part.tokens = part_tokens
                    yield part

    def _filled(self, text: str, piece: _Piece) -> Iterator[int]:
        """Where a stretch without boundaries is cut: filled from its start, reading each character once or twice."""
        at = piece.start
        while at < piece.end:
            window = text[at : min(at + self._room * _CHARS_PER_TOKEN, piece.end)]
            offsets = self._tokenizer.encode(window, add_special_tokens=False).offsets
            fits = offsets[self._room][0] if len(offsets) > self._room else len(window)
            if at + fits < piece.end:
                word_end = window.rfind(" ", fits // 2, fits) + 1
                fits = word_end or max(fits, 1)
            at += fits
            yield at

    def _count(self, text: str, pieces: Sequence[_Piece]) -> list[int]:
        """Tokens of each piece, without special ones; an over-long piece is not read to its end."""
        longest = self._room * _CHARS_PER_TOKEN
        sizes = (piece.end - piece.start for piece in pieces)
        counts = (self._tokens(text[piece.start : min(piece.end, piece.start + longest)]) for piece in pieces)
        return [max(count, -(-size // _CHARS_PER_TOKEN)) for count, size in zip(counts, sizes, strict=True)]

    def _groups(self, text: str, pieces: Sequence[_Piece]) -> Iterator[tuple[int, int]]:
        """Ranges of pieces that make one passage each."""
        ends = list(accumulate((piece.tokens for piece in pieces), initial=0))
        worth = [(piece.rank, _hash_at(text, piece.start)) for piece in pieces]
        waiting = [(0, len(pieces))] if pieces else []
        while waiting:
            first, end = waiting.pop()
            total = ends[end] - ends[first]
            if total <= self._room or end - first == 1:
                yield first, end
                continue
            low = max(bisect_left(ends, ends[first] + total * _MARGIN), first + 1)
            high = min(bisect_right(ends, ends[end] - total * _MARGIN), end)
            if low < high:
                cut = max(range(low, high), key=worth.__getitem__)
            else:  # one piece fills the middle: the cut goes to its nearer side
                middle = (ends[first] + ends[end]) / 2
                cut = min(range(max(low - 1, first + 1), min(low + 1, end)), key=lambda at: abs(ends[at] - middle))
            waiting += [(cut, end), (first, cut)]

    def _with_overlap(self, pieces: Sequence[_Piece], first: int) -> int:
        room = self._overlap
        while first > 0 and pieces[first - 1].tokens <= room:
            first -= 1
            room -= pieces[first].tokens
        return first


def embedding_text(title: str | None, chunk: PlannedChunk | StoredChunk) -> str:
    """What is embedded for a passage: title and headings above it, then the passage. ``text_sha256`` is its hash.

    It identifies the vector and nothing else: the context is cut, and different headings may join to the same one.
    """
    return _in_context(title, chunk.heading_path, chunk.text)


def _in_context(title: str | None, heading_path: Sequence[str], passage: str) -> str:
    above = [heading for heading in heading_path if heading != title]
    context = " > ".join([title, *above] if title else above)[:MAX_CONTEXT_CHARS]
    return f"{context}\n{passage}" if context else passage


def _hash_at(text: str, start: int) -> int:
    return zlib.crc32(text[start : start + _HASHED_CHARS].strip().encode())


def _blocks(text: str) -> list[_Piece]:
    """Headings, paragraphs, list items and table rows of ``text``, in order and without gaps."""
    blocks: list[_Piece] = []
    fence = ""
    after_blank = True
    start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        line = text[start:end].rstrip("\r\n")
        blank = not line or line.isspace()
        heading: tuple[int, str] | None = None
        rank: int | None = None
        mark = _FENCE.match(line)
        if fence:
            if mark and mark[1].startswith(fence) and line.strip() == mark[1]:
                fence = ""
        elif mark:
            fence = mark[1]
            rank = _PARAGRAPH if after_blank else None
        elif match := _HEADING.match(line):
            heading = (len(match[1]), _without_closing_marks(match[2]))
            rank = _HIGHEST_HEADING - heading[0]
        elif not after_blank and (match := _UNDERLINE.match(line)):
            _underline(blocks[-1], 1 if match[1] else 2, text)
        elif not blank:
            rank = _rank(line, after_blank=after_blank)
        if rank is not None or not blocks:
            blocks.append(_Piece(start, end, _PARAGRAPH if rank is None else rank, heading))
        blocks[-1].end = end
        after_blank = blank
        start = end
    _keep_headings_with_text(blocks)
    return blocks


def _without_closing_marks(heading: str) -> str:
    """``Raises ##`` is the heading "Raises", ``C#`` is "C#". By hand: an expression for it takes quadratic time."""
    bare = heading.rstrip().rstrip("#")
    return bare.rstrip() if not bare or bare[-1] in " \t" else heading.rstrip()


def _underline(block: _Piece, level: int, text: str) -> None:
    """Make ``block`` a heading if it is one plain line, which is what an underline can do."""
    line = text[block.start : block.end].strip("\r\n")
    if block.rank == _PARAGRAPH and not block.heading and "\n" not in line and not _FENCE.match(line):
        block.heading = (level, line.strip())
        block.rank = _HIGHEST_HEADING - level


def _keep_headings_with_text(blocks: Sequence[_Piece]) -> None:
    for before, block in pairwise(blocks):
        if before.heading and not block.heading:
            block.rank = _AFTER_HEADING


def _rank(line: str, *, after_blank: bool) -> int | None:
    """How good a place to cut the start of a line is; ``None`` for one that goes on with its block."""
    indented = line[0] in " \t"
    if _ITEM.match(line):
        return _LINE if indented else _ITEM_START
    if line.startswith("|"):
        return _ITEM_START
    if after_blank:
        return _ITEM_START if indented else _PARAGRAPH
    return None


def _cut_up(piece: _Piece, cuts: Iterator[int], text: str, rank: int | None = None) -> list[_Piece]:
    """``piece`` cut at each of ``cuts``; the first part keeps what is known of its start."""
    bounds = [piece.start, *(cut for cut in cuts if piece.start < cut < piece.end), piece.end]
    first, *others = [_Piece(start, end, _ANYWHERE) for start, end in pairwise(bounds)]
    first.rank, first.heading = piece.rank, piece.heading
    for part in others:
        part.rank = rank if rank is not None else _LINE if text[part.start - 1] == "\n" else _SENTENCE
    return [first, *others]


def _heading_paths(pieces: Sequence[_Piece]) -> list[tuple[str, ...]]:
    """Headings above each piece; a heading is not above itself."""
    paths: list[tuple[str, ...]] = []
    above: list[tuple[int, str]] = []
    for piece in pieces:
        if piece.heading:
            above = [heading for heading in above if heading[0] < piece.heading[0]]
        paths.append(tuple(name for _, name in above if name))
        if piece.heading:
            above.append(piece.heading)
    return paths
