"""Passages: where they are cut, what an edit costs, and how long splitting takes."""

import gc
import gzip
import json
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from infra.embedding.onnx import load_tokenizer
from infra.settings import Settings
from schemas.events import PlannedChunk
from streams.core.splitting import MAX_CONTEXT_CHARS, Splitter, embedding_text
from streams.parsing.parse import parse

SHARED = Path(__file__).parents[3] / "shared"
HANDBOOK = SHARED / "corpora" / "handbook-18f.events.jsonl.gz"
RELEASE_NOTES = SHARED / "corpora" / "ugly" / "markdown_huge" / "release-notes.md"


def words_tokenizer() -> str:
    """One token for each word and each mark, of any length: counts are plain to see."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return str(tokenizer.to_str())


def model_tokenizer() -> Tokenizer:
    embedding = Settings().embedding
    return load_tokenizer(embedding.models_path, embedding.model)


def splitter(chunk_tokens: int = 20, overlap_tokens: int = 0) -> Splitter:
    return Splitter(words_tokenizer(), chunk_tokens, overlap_tokens)


def paragraph(name: str, words: int = 12) -> str:
    return " ".join(f"{name}{number}" for number in range(words))


def test_a_short_document_is_one_passage():
    text = "  \n# Leave\n\nAsk your lead.\n\n"
    (chunk,) = splitter().split(text, "Leave")
    assert chunk.text == "# Leave\n\nAsk your lead."
    assert text[chunk.start : chunk.end] == chunk.text


@pytest.mark.parametrize("text", ["", " \n\t\n", "\r\n\r\n"])
def test_a_blank_document_has_no_passages(text: str):
    assert splitter().split(text, "Title") == []


def test_cuts_prefer_headings_and_know_what_is_above():
    headings = {"# Pay": "intro", "## Raises": "raise", "### When": "when", "## Bonus": "bonus"}
    text = "\n\n".join(f"{heading}\n\n{paragraph(name, 16)}" for heading, name in headings.items())
    assert [(chunk.heading_path, chunk.text.split("\n")[0]) for chunk in splitter(24).split(text, None)] == [
        ((), "# Pay"),
        (("Pay",), "## Raises"),
        (("Pay", "Raises"), "### When"),
        (("Pay",), "## Bonus"),
    ]


def test_a_heading_stays_with_its_text():
    text = f"{paragraph('before', 15)}\n\n## Rule\n\n{paragraph('first', 10)}\n\n{paragraph('second', 10)}"
    assert any("## Rule\n\nfirst0" in chunk.text for chunk in splitter().split(text, None))


def test_an_underlined_line_is_a_heading_too():
    text = f"Pay\n===\n\n{paragraph('a')}\n\nRaises\n------\n\n{paragraph('b')}\n\n{paragraph('c')}"
    assert splitter().split(text, None)[-1].heading_path == ("Pay", "Raises")


@pytest.mark.parametrize(
    ("line", "heading"),
    [("## Pay ##", "Pay"), ("##   Pay   ", "Pay"), ("## C#", "C#"), ("## C# #", "C#"), ("# #5", "#5")],
)
def test_closing_marks_are_not_part_of_a_heading(line: str, heading: str):
    text = f"{line}\n\n{paragraph('a')}\n\n{paragraph('b')}"
    assert splitter().split(text, None)[-1].heading_path == (heading,)


def test_what_lookups_like_a_heading_in_code_is_none():
    text = f"# Real\n\n```sh\n# comment\n{paragraph('code')}\n```\n\n{paragraph('after')}\n\n{paragraph('last')}"
    assert {heading for chunk in splitter().split(text, None) for heading in chunk.heading_path} == {"Real"}


def test_identity_is_the_hash_of_what_is_embedded():
    text = f"# Pay\n\n{paragraph('a', 15)}\n\n{paragraph('b', 15)}"
    last = splitter().split(text, "Handbook")[-1]
    assert embedding_text("Handbook", last).startswith("Handbook > Pay\nb0")
    renamed = splitter().split(text, "Guide")[-1]
    assert renamed.text == last.text
    assert renamed.text_sha256 != last.text_sha256


def test_a_title_that_is_also_the_heading_is_stated_once():
    chunk = PlannedChunk(text="t", heading_path=("Pay", "Raises"), start=0, end=1, text_sha256="")
    assert embedding_text("Pay", chunk) == "Pay > Raises\nt"
    assert embedding_text(None, chunk) == "Pay > Raises\nt"


def test_endless_titles_and_headings_are_bounded():
    chunk = PlannedChunk(text="t", heading_path=("h" * 10_000,), start=0, end=1, text_sha256="")
    assert len(embedding_text("t" * 10_000, chunk)) <= MAX_CONTEXT_CHARS + 2


def test_overlap_repeats_whole_pieces_of_the_passage_before():
    text = "\n\n".join(f"{name}1 {name}2 {name}3 {name}4" for name in "abcdefgh")
    plain, lapped = splitter(16).split(text, None), splitter(16, 4).split(text, None)
    assert all(one.end <= other.start for one, other in pairwise(plain))
    assert all(one.end > other.start for one, other in pairwise(lapped))


@pytest.mark.parametrize(("chunk_tokens", "overlap_tokens"), [(16, 9), (16, 500)])
def test_too_much_overlap_is_refused(chunk_tokens: int, overlap_tokens: int):
    with pytest.raises(ValueError, match=f"overlap_tokens is {overlap_tokens}"):
        splitter(chunk_tokens, overlap_tokens)


def test_inserting_early_in_one_endless_section_keeps_nearly_all_passages():
    """The case that fills passages one after the other badly: everything behind the edit would move."""
    paragraphs = [paragraph(f"p{number}x", 8) for number in range(200)]
    before = {chunk.text_sha256 for chunk in splitter().split("\n\n".join(paragraphs), "t")}
    paragraphs.insert(3, paragraph("new", 9))
    after = [chunk.text_sha256 for chunk in splitter().split("\n\n".join(paragraphs), "t")]
    assert sum(one not in before for one in after) <= 0.1 * len(after)


@pytest.mark.parametrize(
    "text",
    [
        "# a heading\n\n" * 100_000,
        "x" * 3_000_000,
        "word " * 600_000,
        "\n" * 2_000_000,
        "ab\n" * 600_000,
        "- " * 500_000,
        "# a" + " " * 400_000 + "b",
    ],
    ids=["headings", "one word", "one line", "line ends", "short lines", "item marks", "wide heading"],
)
def test_no_shape_of_text_takes_more_than_linear_time(text: str):
    """Each is compared with its own quarter: a quadratic step would take 16 times as long, not 4 times.

    The collector is off, as in `timeit`: it scans the objects of all earlier tests, which the shape does not cause.
    """
    subject = splitter(200)

    def cost(part: str) -> float:
        began = time.process_time()
        subject.split(part, "t")
        return time.process_time() - began

    gc.collect()
    gc.disable()
    try:
        quarter = max(min(cost(text[: len(text) // 4]) for _ in range(3)), 0.01)
        assert min(cost(text) for _ in range(2)) < 10 * quarter
    finally:
        gc.enable()


def test_real_release_notes_split_at_once():
    if not RELEASE_NOTES.exists():
        pytest.skip("../shared/corpora is not here")
    tokenizer = model_tokenizer()
    text = RELEASE_NOTES.read_text()
    began = time.process_time()
    chunks = Splitter(tokenizer.to_str(), 200).split(text, None)
    assert time.process_time() - began < 5
    assert max(len(encoding) for encoding in tokenizer.encode_batch([chunk.text for chunk in chunks])) <= 200


def test_real_edits_embed_little_again():
    """A company handbook's history: what share of an edited page's passages is new to that page."""
    if not HANDBOOK.exists():
        pytest.skip("../shared/corpora is not here")
    tokenizer = model_tokenizer()
    subject = Splitter(tokenizer.to_str(), 200)
    live: dict[str, list[PlannedChunk]] = {}
    new = total = characters = 0
    seconds = 0.0
    with gzip.open(HANDBOOK, "rt") as lines:
        for event in map(json.loads, lines):
            if event["type"] == "deleted":
                del live[event["doc_id"]]
                continue
            parsed = parse(event["content"].encode(), "text/markdown")
            began = time.process_time()
            chunks = subject.split(parsed.text, parsed.title)
            seconds += time.process_time() - began
            characters += len(parsed.text)
            if event["type"] in {"updated", "renamed"}:
                known = {chunk.text_sha256 for chunk in live[event["doc_id"]]}
                new += sum(chunk.text_sha256 not in known for chunk in chunks)
                total += len(chunks)
            live[event["doc_id"]] = chunks
    lengths = [len(one) for one in tokenizer.encode_batch([chunk.text for chunks in live.values() for chunk in chunks])]
    assert new / total <= 0.15
    assert 2_400 <= len(lengths) <= 3_200
    assert 120 <= mean(lengths) <= 180
    assert max(lengths) <= 200
    assert seconds / characters * 10_000 < 0.015, "processor seconds of both cores for a page of 10 kB"
