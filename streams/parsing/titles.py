"""Finds the title of a Markdown text: its first heading with content, as rendered."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from html.parser import HTMLParser
from itertools import islice
from typing import Final

from markdown_it import MarkdownIt
from typing_extensions import override

# Each of these patterns runs in linear time: no two parts of them can match the same run of spaces.
_HEADING_OR_FENCE: Final = re.compile(
    r"^ {0,3}(?P<mark>#{1,6}(?=[ \t])|`{3,}|~{3,})(?P<rest>.*)$"
    r"|^[ \t]*(?:<[a-z][^<>\n]*>[ \t]*)*<h(?P<level>[1-6])(?:\s[^<>]*)?>",
    re.MULTILINE | re.IGNORECASE,
)
_END_OF_HTML_HEADING: Final = re.compile(r"</h[1-6]", re.IGNORECASE)
_HEADING_ID: Final = re.compile(r"[ \t]\{[#.][^{}]*\}$")

_HEADING_CHARS: Final = 2_000
"""Maximum length of a heading with markup, which is cleaned in a millisecond."""

_MAX_HEADINGS: Final = 50
"""Maximum number of headings that are examined."""


@dataclass(frozen=True, slots=True)
class _Heading:
    """A heading.

    Attributes:
        level: from 1.
        text: text without markup.
        image: alternative text of its images.
    """

    level: int
    text: str
    image: str


def first_heading(text: str) -> str | None:
    """Text of the first heading with content outside of code; ``None`` if there is none.

    The alternative text of an image is used only if no heading of the same or a higher level has text: in many
    documents a logo precedes the title, and in some it is the title.
    """
    image: _Heading | None = None
    for heading in islice(_headings(text), _MAX_HEADINGS):
        if heading.text and (image is None or heading.level <= image.level):
            return heading.text
        if heading.image and image is None:
            image = heading
    return image.image if image else None


def _headings(text: str) -> Iterator[_Heading]:
    fence = ""
    for match in _HEADING_OR_FENCE.finditer(text):
        mark, rest = match["mark"] or "", (match["rest"] or "").strip()
        if fence:
            if mark.startswith(fence) and not rest:
                fence = ""
        elif match["level"]:
            yield _html_heading(int(match["level"]), text[match.end() : match.end() + _HEADING_CHARS])
        elif mark[0] != "#":
            fence = mark
        elif rest.strip("#"):
            bare = rest.rstrip("#")
            yield _markdown_heading(len(mark), bare.rstrip() if bare[-1] in " \t" else rest)


def _markdown_heading(level: int, source: str) -> _Heading:
    source = _HEADING_ID.sub("", source[:_HEADING_CHARS])
    texts: list[str] = []
    markup = _Markup()
    for token in _inline_parser().parseInline(source)[0].children or ():
        match token.type:
            case "image":
                markup.images.append(token.content)
            case "html_inline":
                markup.feed(token.content)
            case "softbreak" | "hardbreak":
                texts.append(" ")
            case _:
                texts.append(token.content)
    return _Heading(level, _one_line(texts), _one_line(markup.images))


def _html_heading(level: int, source: str) -> _Heading:
    end = _END_OF_HTML_HEADING.search(source)
    markup = _Markup()
    markup.feed(source[: end.start()] if end else source.partition("\n")[0])
    markup.close()
    return _Heading(level, _one_line(markup.texts), _one_line(markup.images))


class _Markup(HTMLParser):
    """Collects the text and the alternative texts of HTML."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.texts: list[str] = []
        self.images: list[str] = []

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs).get("alt") or "")
        elif tag == "br":
            self.texts.append(" ")

    @override
    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@cache
def _inline_parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": True})


def _one_line(parts: list[str]) -> str:
    return " ".join("".join(parts).split())
