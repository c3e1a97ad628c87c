"""Splits a parsed document into passages that are easy to find and cheap to update.

One rule applies: a text that is too long is cut in two at its most important boundary (the highest heading, otherwise
between paragraphs, list items, lines, sentences), and each half is split again. Among equal boundaries, a hash of the
following words decides. So the location of a cut depends on the text there, not on the length of the text before it,
and an edit moves only adjacent cuts. Filling passages one after the other would move all cuts after an edit.

Passages that an edit does not change keep their ``text_sha256`` and are not embedded again. Whether they are rewritten
depends on all their stored fields; see ``chunk_identity``.
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
"""Part of the profile. Changes whenever the same document would be split, described or identified differently."""

MAX_CONTEXT_CHARS: Final = 300
"""Longest title and heading path before a passage: about 75 tokens of English in addition to the passage.

Measured on a handbook, with the titles of 124 edits as queries: the edited page had a mean reciprocal rank of 0.56
instead of 0.48; 13 instead of 10 of 100 passages of an edited page had to be embedded again."""

_MARGIN: Final = 0.25
"""Minimum size of a half, as a fraction of the whole, if a boundary allows it. Prevents tiny passages."""
_CHARS_PER_TOKEN: Final = 8
"""Minimum token count of a text, as characters per token. Some tokenizers count a word of any length as one unknown
token."""
_COUNTS_KEPT: Final = 20_000
"""Number of cached token counts, about 10 MB. Most blocks of an edited document were counted before."""
_HASHED_CHARS: Final = 40

_HEADING: Final = re.compile(r" {0,3}(#{1,6})[ \t]+(.*)$")
_UNDERLINE: Final = re.compile(r" {0,3}(?:(=+)|-{3,})[ \t]*$")
_ITEM: Final = re.compile(r"[ \t]*(?:[-*+]|\d{1,9}[.)])[ \t]")
_FENCE: Final = re.compile(r" {0,3}(`{3,}|~{3,})")
_INNER: Final = re.compile(r".{30}.*?(?:\n+|(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])|\Z)", re.DOTALL)
"""Ends of lines and sentences, also of Chinese and Japanese ones, at least 30 characters apart, so that a long text of
short lines does not yield millions of pieces. Also matches the end of the text, so that a search never fails late."""

_HIGHEST_HEADING: Final = 10
"""A heading of level n has rank ``_HIGHEST_HEADING - n``: higher than any boundary below."""
_PARAGRAPH: Final = 3
_ITEM_START: Final = 2
_LINE: Final = 1
_SENTENCE: Final = 0
_ANYWHERE: Final = -1
_AFTER_HEADING: Final = -2
"""A heading stays with the text below it."""


@dataclass(slots=True)
class _Piece:
    """A part of the text that is not split further.

    Attributes:
        start: first character.
        end: one past the last character, which is the start of the next piece.
        rank: importance of the boundary at its start.
        heading: level and text, if the piece starts with a heading.
        tokens: number of tokens.
    """

    start: int
    end: int
    rank: int
    heading: tuple[int, str] | None = None
    tokens: int = 0


class Splitter:
    """Splits text into passages. Deterministic for a given tokenizer and limits.

    Args:
        tokenizer_json: content of the embedding model's ``tokenizer.json``.
        chunk_tokens: longest passage in tokens, special tokens included; ``embedding_text`` may add
            ``MAX_CONTEXT_CHARS`` characters.
        overlap_tokens: maximum number of tokens of the previous passage that a passage repeats; at most half of
            ``chunk_tokens``.

    Raises:
        ValueError: the overlap leaves no room for other text.
    """

    def __init__(self, tokenizer_json: str, chunk_tokens: int, overlap_tokens: int = 0) -> None:
        tokenizer = Tokenizer.from_str(tokenizer_json)
        # Tokenizer files contain the limits of training; counting needs neither.
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
        """Split ``text`` into passages, in order. Together they contain all of it except white space.

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
        """Count the tokens of ``blocks``, and split those that are too long."""
        for block, tokens in zip(blocks, self._count(text, blocks), strict=True):
            block.tokens = tokens
            if tokens <= self._room:
                yield block
            else:
                parts = _split_at(block, (match.end() for match in _INNER.finditer(text, block.start, block.end)), text)
                yield from self._split_words(text, parts)

    def _split_words(self, text: str, pieces: Sequence[_Piece]) -> Iterator[_Piece]:
        for piece, tokens in zip(pieces, self._count(text, pieces), strict=True):
            piece.tokens = tokens
            if tokens <= self._room:
                yield piece
            else:
                # No structure is left: cut between words, otherwise anywhere.
                rest = _split_at(piece, self._word_cuts(text, piece), text, rank=_ANYWHERE)
                for part, part_tokens in zip(rest, self._count(text, rest), strict=True):
                    part.tokens = part_tokens
                    yield part

    def _word_cuts(self, text: str, piece: _Piece) -> Iterator[int]:
        """Cuts of a text without boundaries: filled from its start, reading each character once or twice."""
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
        """Number of tokens of each piece, without special ones. Over-long pieces are not read to the end."""
        longest = self._room * _CHARS_PER_TOKEN
        sizes = (piece.end - piece.start for piece in pieces)
        counts = (self._tokens(text[piece.start : min(piece.end, piece.start + longest)]) for piece in pieces)
        return [max(count, -(-size // _CHARS_PER_TOKEN)) for count, size in zip(counts, sizes, strict=True)]

    def _groups(self, text: str, pieces: Sequence[_Piece]) -> Iterator[tuple[int, int]]:
        """Ranges of pieces, one for each passage."""
        ends = list(accumulate((piece.tokens for piece in pieces), initial=0))
        priorities = [(piece.rank, _hash_at(text, piece.start)) for piece in pieces]
        pending = [(0, len(pieces))] if pieces else []
        while pending:
            first, end = pending.pop()
            total = ends[end] - ends[first]
            if total <= self._room or end - first == 1:
                yield first, end
                continue
            low = max(bisect_left(ends, ends[first] + total * _MARGIN), first + 1)
            high = min(bisect_right(ends, ends[end] - total * _MARGIN), end)
            if low < high:
                cut = max(range(low, high), key=priorities.__getitem__)
            else:  # one piece covers the middle: cut at its nearer side
                middle = (ends[first] + ends[end]) / 2
                cut = min(range(max(low - 1, first + 1), min(low + 1, end)), key=lambda at: abs(ends[at] - middle))
            pending += [(cut, end), (first, cut)]

    def _with_overlap(self, pieces: Sequence[_Piece], first: int) -> int:
        room = self._overlap
        while first > 0 and pieces[first - 1].tokens <= room:
            first -= 1
            room -= pieces[first].tokens
        return first


def embedding_text(title: str | None, chunk: PlannedChunk | StoredChunk) -> str:
    """Text that is embedded for a passage: title and headings, then the passage. ``text_sha256`` is its hash.

    The hash identifies only the vector: the context is truncated, and different headings can yield the same text.
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
    """``Raises ##`` is the heading "Raises", ``C#`` is "C#". A regular expression for this takes quadratic time."""
    bare = heading.rstrip().rstrip("#")
    return bare.rstrip() if not bare or bare[-1] in " \t" else heading.rstrip()


def _underline(block: _Piece, level: int, text: str) -> None:
    """Turn ``block`` into a heading if it is a single plain line, as an underline requires."""
    line = text[block.start : block.end].strip("\r\n")
    if block.rank == _PARAGRAPH and not block.heading and "\n" not in line and not _FENCE.match(line):
        block.heading = (level, line.strip())
        block.rank = _HIGHEST_HEADING - level


def _keep_headings_with_text(blocks: Sequence[_Piece]) -> None:
    for before, block in pairwise(blocks):
        if before.heading and not block.heading:
            block.rank = _AFTER_HEADING


def _rank(line: str, *, after_blank: bool) -> int | None:
    """Importance of the boundary at the start of a line; ``None`` if the line continues its block."""
    indented = line[0] in " \t"
    if _ITEM.match(line):
        return _LINE if indented else _ITEM_START
    if line.startswith("|"):
        return _ITEM_START
    if after_blank:
        return _ITEM_START if indented else _PARAGRAPH
    return None


def _split_at(piece: _Piece, cuts: Iterator[int], text: str, rank: int | None = None) -> list[_Piece]:
    """Split ``piece`` at each of ``cuts``; the first part keeps rank and heading."""
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
