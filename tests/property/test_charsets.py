"""Text in any declared, supported charset is decoded to what was written."""

from contextlib import suppress

import webencodings
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ingest.core.content import choose_content_type
from schemas.charsets import declared_charset, find_charset
from schemas.content_types import CSV, HTML, MARKDOWN, PLAIN, XML
from streams.parsing.charsets import with_line_feeds
from streams.parsing.parse import ParseFailed, parse

STANDARD = sorted({label for label in webencodings.LABELS if find_charset(label) is not None})
OTHERS = ["cp437", "cp850", "IBM037", "hz", "iso-2022-kr", "UTF-32", "utf-32be", "UTF-7", "mac-latin2", "us-ascii"]
ALL = [*STANDARD, *OTHERS]
LABELS = st.sampled_from(ALL)
QUOTES = st.sampled_from(["{}", '"{}"', "'{}'"])
MARKS = (b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\0\0\xfe\xff")
CASES = st.sampled_from([str.lower, str.upper, str.title])
TEXTS = st.text(st.characters(exclude_characters="\0\ufeff", exclude_categories=["Cs"]), max_size=60)
WORDS = [
    "Größe 5 €",
    "„günstig“",
    "Привет мир",
    "日本語の文書",
    "Łódź",
    "Καλημέρα",
    "שלום",
    "مرحبا",
    "中文",
    "한국어",
    "Dvořák",
]
SAMPLES = st.sampled_from(WORDS)


def event_type(media_type: str, label: str, write, quote: str) -> str:
    """The media type of the event for what a sender declares."""
    return choose_content_type(f"{media_type}; charset={quote.format(write(label))}", None)


def written_in(text: str, codec: str) -> bytes:
    """The part of the text that survives encoding and decoding; East Asian codecs change some characters."""
    kept = []
    for char in text:
        with suppress(UnicodeError):
            if char.encode(codec).decode(codec) == char:
                kept.append(char)
    return "".join(kept).encode(codec)


@given(st.one_of(TEXTS, SAMPLES), LABELS, CASES, QUOTES)
@settings(deadline=None)
def test_text_in_a_declared_charset_is_decoded_as_written(text, label, write, quote):
    codec = find_charset(label).codec
    content = written_in(text, codec)
    assume(not content.startswith(MARKS))
    carried = event_type(PLAIN, label, write, quote)
    assert parse(content, PLAIN, declared_charset(carried)).text == with_line_feeds(content.decode(codec))


def test_latin_1_is_decoded_as_cp1252_with_control_characters():
    assert parse(b"\x80\x81\x8d\xa0\xff", PLAIN, "iso-8859-1").text == "\u20ac\x81\x8d\xa0ÿ"


def can_write(label: str, word: str) -> bool:
    codec = find_charset(label).codec
    return written_in(word, codec).decode(codec) == word


@given(
    st.sampled_from([HTML, XML, CSV, MARKDOWN]),
    st.sampled_from([(label, word) for label in ALL for word in WORDS if can_write(label, word)]),
)
@settings(deadline=None)
def test_all_text_formats_use_the_declared_charset(media_type, written):
    """Even if the content names another charset."""
    label, word = written
    codec = find_charset(label).codec
    content = {
        HTML: f'<html><head><meta charset="koi8-u"></head><body><p>{word}</p></body></html>',
        XML: f'<?xml version="1.0" encoding="koi8-u"?><rss><channel><title>{word}</title></channel></rss>',
        CSV: f"name,city\nAda,{word}\n",
        MARKDOWN: f"---\ntags: [{word}]\n---\n# {word}\n",
    }[media_type]
    encoded = written_in(content, codec)
    assert word in encoded.decode(codec)
    parsed = parse(encoded, media_type, declared_charset(event_type(media_type, label, str.upper, "{}")))
    assert word in parsed.text
    assert media_type != MARKDOWN or (parsed.title, parsed.metadata) == (word, {"tags": (word,)})


@given(TEXTS, st.sampled_from(["utf-8-sig", "utf-16", "utf-32"]), st.one_of(st.none(), LABELS))
def test_a_byte_order_mark_overrides_the_declared_charset(text, codec, label):
    assert parse(text.encode(codec), PLAIN, label).text == with_line_feeds(text)


@given(TEXTS)
def test_valid_utf8_is_decoded_as_utf8_without_a_declared_charset(text):
    assume(not text.startswith("\0"))
    assert parse(text.encode(), PLAIN).text == with_line_feeds(text)


@settings(deadline=None)
@given(st.binary(max_size=80), st.one_of(st.none(), st.text(max_size=20), LABELS))
def test_any_bytes_with_any_label_are_decoded_or_rejected(content, label):
    try:
        parse(content, PLAIN, label)
    except ParseFailed as failure:
        assert failure.kind == "broken"  # noqa: PT017 - decoded text is valid too
