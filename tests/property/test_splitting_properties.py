"""Passages of any document are exact, ordered parts of its text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from schemas.events import Change, ChunkPlan, DocumentEvent
from streams.core.chunk_identity import stored_chunks
from streams.core.splitting import Splitter, embedding_text

CHUNK_TOKENS = 24

_LINES = st.one_of(
    st.sampled_from(["", "", "# Pay", "## Raises and a bonus", "###### deep", "Pay", "===", "---", "```", "~~~~", " "]),
    st.sampled_from(["- item one", "  - nested item", "1. first", "| a | b |", "|---|---|", "\t", "\r", "> quote"]),
    st.text(alphabet="ab c.!?", max_size=200),
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60),
    st.text(alphabet="x", min_size=300, max_size=900),
    st.text(alphabet="天地。人", max_size=80),
)
documents = st.lists(_LINES, max_size=40).map("\n".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A word-piece tokenizer with two special tokens, as BERT-like models have."""
    marks = ["[UNK]", "[CLS]", "[SEP]", *".!?#-|`~"]
    vocabulary = {piece: number for number, piece in enumerate([*marks, *"abcdefx", "##a", "##b", "##x", "ab", "item"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    # Some published tokenizers enable these; counting must ignore them.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return tokenizer


@pytest.fixture(scope="module")
def splitter(tokenizer: Tokenizer) -> Splitter:
    return Splitter(tokenizer.to_str(), CHUNK_TOKENS)


@given(text=documents, title=st.none() | st.text(alphabet="ab ", max_size=20))
@settings(max_examples=300, deadline=None)
def test_passages_cover_the_document_in_order(splitter: Splitter, text: str, title: str | None):
    chunks = splitter.split(text, title)
    at = 0
    for chunk in chunks:
        assert at <= chunk.start < chunk.end <= len(text)
        assert chunk.text == text[chunk.start : chunk.end]
        assert not text[at : chunk.start].strip()
        assert chunk.text == chunk.text.strip()
        assert chunk.text
        at = chunk.end
    assert not text[at:].strip()


@given(text=documents)
@settings(max_examples=300, deadline=None)
def test_no_passage_exceeds_the_token_limit(splitter: Splitter, tokenizer: Tokenizer, text: str):
    counting = Tokenizer.from_str(tokenizer.to_str())
    counting.no_truncation()
    counting.no_padding()
    for chunk in splitter.split(text, None):
        assert len(counting.encode(chunk.text)) <= CHUNK_TOKENS
        assert len(chunk.text) <= CHUNK_TOKENS * 8


@given(text=documents, title=st.none() | st.just("Title"))
@settings(max_examples=100, deadline=None)
def test_splitting_is_deterministic(tokenizer: Tokenizer, splitter: Splitter, text: str, title: str | None):
    assert Splitter(tokenizer.to_str(), CHUNK_TOKENS).split(text, title) == splitter.split(text, title)


@given(text=documents)
@settings(max_examples=100, deadline=None)
def test_equal_text_hashes_mean_equal_embedded_texts_and_ids_are_unique(splitter: Splitter, text: str):
    event = DocumentEvent(
        event_id="e", tenant="acme", document_id="page", version=1, change=Change.DELETED, accepted_ms=0
    )
    plan = ChunkPlan(event=event, position="documents.v1-0:0", profile="p", chunked_ms=0, title="Title")
    chunks = splitter.split(text, "Title")
    embedded: dict[str, str] = {}
    for chunk in chunks:
        assert embedded.setdefault(chunk.text_sha256, embedding_text("Title", chunk)) == embedding_text("Title", chunk)
    ids = [chunk.chunk_id for chunk in stored_chunks(plan, chunks)]
    assert len(set(ids)) == len(ids)


@given(text=documents)
@settings(max_examples=100, deadline=None)
def test_overlapping_passages_cover_the_document(tokenizer: Tokenizer, text: str):
    chunks = Splitter(tokenizer.to_str(), CHUNK_TOKENS, 8).split(text, None)
    covered = 0
    for chunk in chunks:
        assert chunk.text == text[chunk.start : chunk.end]
        assert not text[covered : chunk.start].strip()
        covered = max(covered, chunk.end)
    assert not text[covered:].strip()
