"""Text of each document type, and failures. Without child processes."""

import io
import json
import time
import zipfile
from email.message import EmailMessage

import openpyxl
import pptx
import pytest

from schemas.content_types import (
    CSV,
    DOCX,
    EMAIL,
    EPUB,
    HTML,
    JSON,
    MARKDOWN,
    NOTEBOOK,
    PDF,
    PLAIN,
    PPTX,
    RSS,
    SUPPORTED_TYPES,
    XLSX,
    XML,
)
from streams.parsing.charsets import decode
from streams.parsing.parse import ParseFailed, media_type_of, parse


def archive(files: dict[str, str]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as written:
        for name, text in files.items():
            written.writestr(name, text)
    return content.getvalue()


def docx(body: str) -> bytes:
    names = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    kind = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    relation = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
    return archive(
        {
            "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
            f'<Override PartName="/word/document.xml" ContentType="{kind}"/></Types>',
            "_rels/.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
            f'<Relationship Id="r1" Type="{relation}" Target="word/document.xml"/></Relationships>',
            "word/document.xml": f"<w:document {names}><w:body>{body}</w:body></w:document>",
        }
    )


def office(document: object) -> bytes:
    content = io.BytesIO()
    document.save(content)
    return content.getvalue()


def test_front_matter_gives_the_title_and_leaves_the_text():
    parsed = parse(b"---\ntitle: Pay and raises\ntags: [pay]\n---\n\n# Other\n\nText", MARKDOWN)
    assert (parsed.title, parsed.text) == ("Pay and raises", "\n# Other\n\nText")


@pytest.mark.parametrize(
    ("field", "title"),
    [
        ('title: "Quoted: yes"', "Quoted: yes"),
        ("title: 'Single'", "Single"),
        ("title: tight#not a comment", "tight#not a comment"),
        ("title: Loose # a comment", "Loose"),
        ("Title: Capital", "Capital"),
        ("title: >-\n  Folded\n  lines", "Folded lines"),
        ("title: |\n  Kept\n  lines\n", "Kept lines"),
        ("title: 2026-01-02", "2026-01-02"),
        ("title: No", "No"),
        ("title: ''", "Heading"),
        ("title: ~", "Heading"),
        ("title: [a, b]", "Heading"),
        ("title:", "Heading"),
        ("subtitle: No", "Heading"),
        ("other:\n  title: nested", "Heading"),
    ],
)
def test_titles_in_front_matter(field: str, title: str):
    assert parse(f"---\n{field}\n---\n# Heading\n".encode(), MARKDOWN).title == title


def test_a_rule_is_no_front_matter():
    parsed = parse(b"---\nonly a rule\n\ntext", MARKDOWN)
    assert (parsed.title, parsed.text) == (None, "---\nonly a rule\n\ntext")


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("intro\n\n## First ##\n\n# Second", "First"),
        ("```\n# code\n```\n# Real", "Real"),
        ("~~~~\n~~~\n# code\n~~~~\n# C#", "C#"),
        ("#no heading", None),
        ("# \n\n#\n", None),
        ("# spread \t  out", "spread out"),
        ("# ![logo](l.png)\n\n# Real title", "Real title"),
        ("# ![Numbat](l.png)\n\n## Installation", "Numbat"),
        ("# ![](l.png)\n\n## Installation", "Installation"),
        ("# *Very* [good](x) `code` &amp; \\* <b>bold</b> {#id}", "Very good code & * bold"),
        ("text\n<div><h1 align='center'>Project\n<i>Numbat</i> &amp; Co</h1></div>\n# Other", "Project Numbat & Co"),
        ("<h1><img alt='Logo' src='x'></h1>\n# Other", "Other"),
        ("Use `<h1>no</h1>` here.\n\n```\n<h1>code</h1>\n```\n# Real", "Real"),
        ("", None),
    ],
)
def test_else_the_first_heading_is_the_title(text: str, title: str | None):
    assert parse(text.encode(), MARKDOWN).title == title


def test_plain_text_is_taken_as_it_is():
    parsed = parse(b"# not a title\r\nnext\0 line", PLAIN)
    assert (parsed.title, parsed.text) == (None, "# not a title\nnext line")


def test_a_title_is_bounded():
    assert len(parse(("# " + "t" * 10_000).encode(), MARKDOWN).title or "") == 500


@pytest.mark.parametrize(
    "text",
    [
        "# ![](x)\n" * 60_000,
        "<h1 " * 100_000,
        "<a> " * 100_000,
        "<h1 \n" * 100_000,
        "# " + "[" * 100_000,
        " \n" * 200_000 + "x",
        "# a" + " " * 300_000 + "b",
        "---\ntitle:" + " " * 300_000 + "b\n---\n",
        "---\n" * 100_000,
        "```\n" * 100_000,
    ],
)
def test_no_shape_of_markdown_takes_long(text: str):
    """It is read in the worker's own process: a regular expression gone quadratic would stop everything there."""
    began = time.process_time()
    parse(text.encode(), MARKDOWN)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("content", "charset", "text"),
    [
        ("Zoë".encode(), None, "Zoë"),
        (b"\xef\xbb\xbfZo\xc3\xab", None, "Zoë"),
        ("Zoë".encode("utf-16"), None, "Zoë"),
        ("Zoë".encode("utf-32"), None, "Zoë"),
        ("Zoë".encode("latin-1"), "iso-8859-1", "Zoë"),
        ("Zoë".encode(), "no-such-charset", "Zoë"),
        ("名前、年齢、住所".encode("shift-jis") * 20, None, "名前、年齢、住所" * 20),
        (b"", None, ""),
        ("Käse".encode("latin-1"), None, "Käse"),
        ("El niño comió en España.".encode("latin-1"), None, "El niño comió en España."),
        ("5 € – „gut“".encode("cp1252"), None, "5 € – „gut“"),  # noqa: RUF001 - as people write
        ("Привет, мир. Как дела?".encode("cp1251"), None, "Привет, мир. Как дела?"),
        ("日本語の文書です。".encode("cp932"), None, "日本語の文書です。"),
        ("Zoë".encode(), "us-ascii", "Zoë"),
        ("Zoë".encode("latin-1"), "us-ascii", "Zoë"),
    ],
)
def test_encodings(content: bytes, charset: str | None, text: str):
    assert decode(content, charset) == text


def test_bytes_that_are_no_text_are_reported():
    with pytest.raises(ParseFailed, match="send it as UTF-8") as failed:
        parse(bytes(range(256)) * 4, PLAIN)
    assert failed.value.kind == "broken"


@pytest.mark.parametrize(("content", "charset"), [(b"Z\xfcrich", "utf-8"), (b"\x81", "gbk"), (b"a\0b", "utf-16le")])
@pytest.mark.parametrize("media_type", [PLAIN, MARKDOWN, HTML, CSV, XML])
def test_content_that_is_not_in_its_declared_charset_is_reported(content: bytes, charset: str, media_type: str):
    with pytest.raises(ParseFailed, match=f"are not {charset}") as failed:
        parse(content, media_type, charset)
    assert failed.value.kind == "broken"


def test_html():
    page = "<html><head><title> Pay\nrules </title><style>p{}</style></head><body><h1>Pay</h1><p>Ask.<script>x</script>"
    parsed = parse(page.encode(), HTML)
    assert (parsed.title, parsed.text) == ("Pay rules", "# Pay\n\nAsk.")


def test_html_names_its_own_encoding():
    assert parse('<meta charset="iso-8859-2"><p>Łódź'.encode("iso-8859-2"), HTML).text == "Łódź"


@pytest.mark.parametrize(
    ("page", "encoding"),
    [
        ('<meta charset="utf-16"><p>Łódź', "utf-8"),  # it could not have been read as UTF-16
        ('<meta charset="no-such"><p>Łódź', "utf-8"),
        ('<meta charset="us-ascii"><p>Łódź', "utf-8"),
        ('<meta charset="shift_jis"><p>日本語の文書', "cp932"),
        ('<meta charset="iso-2022-jp"><p>日本語の文書', "iso-2022-jp"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=koi8-r"><p>Привет', "koi8-r"),
        ('<?xml version="1.0" encoding="koi8-r"?><html><p>Привет</p></html>', "koi8-r"),
        ('<meta charset="koi8-r"><p>Привет', "utf-16"),
    ],
)
def test_html_in_the_encoding_that_it_names(page: str, encoding: str):
    assert parse(page.encode(encoding), HTML).text.strip() == page.partition("<p>")[2].partition("<")[0]


@pytest.mark.parametrize("encoding", ["shift_jis", "euc-jp", "gb18030", "utf-16", "utf-8"])
def test_xml_in_the_encoding_that_it_names(encoding: str):
    feed = f"<?xml version='1.0' encoding='{encoding}'?><rss><channel><title>日本語の文書</title></channel></rss>"
    assert parse(feed.encode(encoding), RSS).title == "日本語の文書"
    assert parse(feed.encode("utf-8"), RSS, "utf-8").title == "日本語の文書"


def test_csv_and_json_and_notebook():
    assert parse(b"name,age\nAda,36\n", CSV).text.splitlines()[2] == "| Ada | 36 |"
    assert parse(b'{"name":"Zo\\u00eb"}', JSON).text == '{\n "name": "Zoë"\n}'
    cells = [{"cell_type": "markdown", "source": ["# Title\n", "text"]}, {"cell_type": "code", "source": ["1+1"]}]
    parsed = parse(json.dumps({"cells": cells, "nbformat": 4}).encode(), NOTEBOOK)
    assert parsed.title == "Title"
    assert "```python\n1+1\n```" in parsed.text


def test_feeds_and_other_xml():
    feed = b"<rss version='2.0'><channel><title>ChangeLoader</title><item><title>One</title></item></channel></rss>"
    for media_type in (RSS, XML):
        assert parse(feed, media_type).title == "ChangeLoader"
    assert parse(b"<a><b>text</b></a>", XML).text == "<a><b>text</b></a>"


def test_office_documents():
    parsed = parse(docx("<w:p><w:r><w:t>Hello Word</w:t></w:r></w:p>"), DOCX)
    assert parsed.text == "Hello Word"
    slides = pptx.Presentation()
    slides.slides.add_slide(slides.slide_layouts[5]).shapes.title.text = "Quarter"
    assert parse(office(slides), PPTX).title == "Quarter"
    book = openpyxl.Workbook()
    book.active.append(["name", "age"])
    book.active.append(["Ada", 36])
    assert "| Ada | 36 |" in parse(office(book), XLSX).text


def test_epub():
    package = (
        '<package xmlns:dc="d"><metadata><dc:title>Book</dc:title></metadata><manifest><item id="a" href="a.html"/>'
        '</manifest><spine><itemref idref="a"/></spine></package>'
    )
    container = '<container><rootfiles><rootfile full-path="o.opf"/></rootfiles></container>'
    book = archive({"META-INF/container.xml": container, "o.opf": package, "a.html": "<h1>One</h1><p>Text</p>"})
    parsed = parse(book, EPUB)
    assert parsed.title == "Book"
    assert "# One\n\nText" in parsed.text


def test_mail_prefers_plain_text_and_names_attachments():
    message = EmailMessage()
    message["Subject"], message["From"], message["To"] = "Raise", "Ada <ada@example.org>", "pay@example.org"
    message.set_content("Please.")
    message.add_alternative("<p>Please!</p>", subtype="html")
    message.add_attachment(b"PK", maintype="application", subtype="zip", filename="proof.zip")
    parsed = parse(message.as_bytes(), EMAIL)
    assert parsed.title == "Raise"
    assert "From: Ada <ada@example.org>" in parsed.text
    assert "Please.\n" in parsed.text
    assert "Attachment: proof.zip" in parsed.text
    assert "Please!" not in parsed.text


def test_mail_in_html_only():
    message = EmailMessage()
    message.set_content("<h1>Hi</h1>", subtype="html")
    assert parse(message.as_bytes(), EMAIL).text.endswith("# Hi")


@pytest.mark.parametrize("declared", ["", "; charset=us-ascii", "; charset=no-such", "; charset=utf-8"])
def test_mail_in_eight_bits_that_states_nothing_true(declared: str):
    mail = f"Subject: x\nContent-Type: text/plain{declared}\nContent-Transfer-Encoding: 8bit\n\nGrüße aus Zürich.\n"
    assert "Grüße aus Zürich." in parse(mail.encode("latin-1"), EMAIL).text
    if declared != "; charset=utf-8":
        assert "Grüße aus Zürich." in parse(mail.encode("utf-8"), EMAIL, "utf-8").text


@pytest.mark.parametrize(
    ("content", "media_type"),
    [
        (b"no pdf", PDF),
        (b"no zip", DOCX),
        (archive({"a": "b"}), DOCX),
        (archive({"a": "b"}), PPTX),
        (archive({"a": "b"}), XLSX),
        (archive({"a": "b"}), EPUB),
        (b"{", JSON),
        (b"[" * 200_000, JSON),
        (b"<rss>", RSS),
    ],
)
def test_broken_documents_are_reported(content: bytes, media_type: str):
    with pytest.raises(ParseFailed) as failed:
        parse(content, media_type)
    assert failed.value.kind == "broken"


def test_entities_that_grow_without_end_are_refused():
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    bomb = f'<!DOCTYPE r [<!ENTITY e0 "boom">{entities}]><rss><channel><title>&e11;</title></channel></rss>'
    with pytest.raises(ParseFailed):
        parse(bomb.encode(), RSS)


@pytest.mark.parametrize(
    ("content", "declared", "name", "found"),
    [
        (b"x", "text/markdown; charset=utf-8", "a.pdf", MARKDOWN),
        (b"x", "TEXT/HTML", None, HTML),
        (b"x", None, "docs/A.PDF", PDF),
        (b"x", "application/octet-stream", "a.eml", EMAIL),
        (b"x", "application/unheard-of", "a.md", MARKDOWN),
        (b"%PDF-1.7", None, None, PDF),
        (b"%PDF-1.7", None, "scan.tmp", PDF),
        (b"\n<!DOCTYPE html>", "", None, HTML),
        (b"just words", None, None, PLAIN),
        (docx(""), None, "really.doc", DOCX),
    ],
)
def test_types(content: bytes, declared: str | None, name: str | None, found: str):
    assert media_type_of(content, declared, name) == found


@pytest.mark.parametrize(
    ("content", "declared", "name"),
    [
        (b"\xd0\xcf\x11\xe0", None, "a.doc"),
        (b"just words", None, "a.exe"),
        (b"just words", "application/msword", None),
        (b"\0\1\2", None, None),
        (b"", None, None),
        (archive({"notes/word/document.xml": "x"}), None, "a.zip"),
    ],
)
def test_unknown_types_are_refused(content: bytes, declared: str | None, name: str | None):
    with pytest.raises(ParseFailed, match="send one of") as failed:
        media_type_of(content, declared, name)
    assert failed.value.kind == "unsupported"


def test_each_supported_type_has_a_parser():
    for media_type in SUPPORTED_TYPES:
        try:
            parse(b"", media_type)
        except ParseFailed as failure:
            assert failure.kind == "broken"  # noqa: PT017 - empty is broken for some types and empty text for others
