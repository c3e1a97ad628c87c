"""Endless sequences of document events, edge cases included."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from ingest.connectors.event_file import read_events
from ingest.core.changes import DocumentRequest, Removal, Upload
from ingest.core.content import TYPE_OF_SUFFIX
from schemas.documents import DocumentAttributes

_DOCUMENTS: Final = 24
_MARKDOWN: Final = "text/markdown"
_SUBJECTS: Final = ("Hotels", "Flights", "Leave", "Laptops", "Parental leave", "Expenses", "Working abroad", "Security")
_SENTENCES: Final = (
    "The limit is {} euros, and the lead of the team may raise it once.",
    "Ask {} days before; the calendar shows who is away.",
    "Send form {} to the office, which answers within two days.",
    "Staff who have been here for {} months may use it.",
    "It was last reviewed by board {}, which meets each spring.",
)


def generated(seed: int) -> Iterator[DocumentRequest]:
    """Generated uploads, edits and deletes, with reverted, shared and unparseable content, and outdated versions."""
    rng = random.Random(seed)  # noqa: S311 - no secret
    contents: dict[str, list[str]] = {}
    while True:
        document_id = f"handbook/page-{rng.randrange(_DOCUMENTS):02}.md"
        contents_of_document = contents.setdefault(document_id, [])
        choice = rng.random()
        attributes = DocumentAttributes(source=document_id)
        if choice < 0.15:  # noqa: PLR2004 - shares of a history
            yield Removal(document_id)
            continue
        if choice < 0.20:  # noqa: PLR2004 - as above
            yield Upload(document_id, b"%PDF-1.4 and nothing more", "application/pdf", attributes, "page.pdf")
            continue
        if choice < 0.25:  # noqa: PLR2004 - as above
            # An outdated source revision: superseded unless the document is new.
            attributes = attributes.model_copy(update={"revision": rng.randrange(1, 1_000)})
        if contents_of_document and choice > 0.9:  # noqa: PLR2004 - as above
            text = rng.choice(contents_of_document)
        elif choice > 0.85:  # noqa: PLR2004 - as above
            text = rng.choice([text for texts in contents.values() for text in texts] or ["# Empty\n"])
        else:
            text = _page(rng)
            contents_of_document.append(text)
        yield Upload(document_id, text.encode(), _MARKDOWN, attributes, "page.md")


def recorded(file: Path) -> Iterator[DocumentRequest]:
    """The events of a file, repeated endlessly. Versions are assigned, so each round supersedes the previous one."""
    contents: dict[str, Upload] = {}
    while True:
        for event in read_events(file):
            if event.type == "deleted":
                contents.pop(event.doc_id, None)
                yield Removal(event.doc_id)
                continue
            name = Path(event.path)
            attributes = DocumentAttributes(source=event.path)
            content, content_type = event.new_content(), TYPE_OF_SUFFIX.get(name.suffix.lower())
            if content is not None and content_type is not None:
                contents[event.doc_id] = Upload(event.doc_id, content, content_type, attributes, name.name)
            if event.doc_id in contents:
                yield replace(contents[event.doc_id], attributes=attributes, file_name=name.name)


def _page(rng: random.Random) -> str:
    subjects = rng.sample(_SUBJECTS, rng.randint(1, 3))
    sections = [
        f"## {subject}\n\n" + " ".join(line.format(rng.randrange(1_000)) for line in rng.sample(_SENTENCES, 3))
        for subject in subjects
    ]
    return "\n\n".join((f"# Page about {subjects[0]}", *sections, ""))
