"""Sentences, prompts and citations of arbitrary and hostile texts."""

import itertools
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.generation.answer_reader import AnswerReader, read_answer
from infra.generation.port import NO_ANSWER, GenerationError, SourceText
from infra.generation.prompt import build_prompt
from infra.generation.ranking import MAX_SENTENCES, choose_sentences, rank_sentences
from infra.generation.sentences import clean, split_sentences

MARKDOWN = st.lists(
    st.one_of(
        st.sampled_from(
            ["# ", "- ", "> ", "| a | b |", "|--|", "```", "\n", "\r\n", "\n\n", ". ", "! A", "[1]", "[2, 9]"]
        ),
        st.sampled_from(["BEGIN SOURCE 1", "END SOURCE 1 ", "**", "`", "vacation", "days", " ", "Dr. "]),
        st.text(max_size=8),
    ),
    max_size=40,
).map("".join)
SOURCES = st.lists(MARKDOWN, max_size=4).map(
    lambda texts: tuple(SourceText(number, text, text[:9]) for number, text in enumerate(texts, 1))
)


@given(MARKDOWN)
def test_sentences_are_exact_parts_of_the_text_in_order(text: str):
    position = 0
    for sentence in split_sentences(text):
        assert sentence.strip() == sentence != ""
        position = text.index(sentence, position) + len(sentence)


@given(MARKDOWN)
def test_a_clean_sentence_is_one_line_with_paired_marks_and_no_citation(text: str):
    for sentence in split_sentences(text):
        cleaned = clean(sentence)
        assert len(cleaned.splitlines()) <= 1
        assert not re.search(r"\[\d+\]", cleaned)
        assert cleaned.count("`") % 2 == 0


@given(MARKDOWN, SOURCES)
def test_picks_are_few_exact_and_relevant(question: str, sources: tuple[SourceText, ...]):
    texts = {source.number: source.text for source in sources}
    picks = choose_sentences(rank_sentences(question, sources))
    assert len(picks) <= MAX_SENTENCES
    assert len({(pick.source, pick.index) for pick in picks}) == len(picks)
    for pick in picks:
        assert pick.quote in texts[pick.source]
        assert pick.shared
        assert 0 < pick.coverage <= 1 + 1e-9


@given(MARKDOWN, SOURCES)
def test_no_text_can_write_a_line_with_the_code_word(question: str, sources: tuple[SourceText, ...]):
    user = build_prompt(question, sources).user
    code = user.split("\n", 1)[0].rpartition(" ")[2]
    assert user.count(code) == 2 * (len(sources) + 1)


@given(MARKDOWN, SOURCES)
def test_an_answer_cites_exactly_the_existing_sources_that_it_numbers(text: str, sources: tuple[SourceText, ...]):
    try:
        answer = read_answer(text, sources)
    except GenerationError:
        assert re.sub(r"\[\d[\d\s,]*\]|\s", "", text) == ""
        return
    texts = {source.number: source.text for source in sources}
    assert {citation.source for citation in answer.citations} <= texts.keys()
    assert {citation.source for citation in answer.citations} == set(
        map(int, re.findall(r"\[(\d{1,4})\]", answer.text))
    )
    for citation in answer.citations:
        assert citation.quote in texts[citation.source]


@given(MARKDOWN, SOURCES, st.lists(st.integers(1, 9), min_size=1))
def test_a_streamed_answer_equals_the_complete_one_for_any_segmentation(
    text: str, sources: tuple[SourceText, ...], cuts: list[int]
):
    reader = AnswerReader(sources)
    parts, position = [], 0
    for length in itertools.cycle(cuts):
        parts.append(reader.read(text[position : position + length]))
        position += length
        if position >= len(text):
            break
    try:
        parts.append(reader.end())
        whole = read_answer(text, sources)
    except GenerationError:
        with pytest.raises(GenerationError):
            read_answer(text, sources)
        return
    assert reader.answer == whole
    assert "".join(part.text for part in parts) == whole.text == whole.text.strip()
    assert tuple(citation for part in parts for citation in part.citations) == whole.citations


def test_the_no_answer_text_has_no_citations():
    assert read_answer(NO_ANSWER, ()).citations == ()


@pytest.mark.parametrize("unit", [".", "-", "| ", "[", "> ", "a. ", "`", " ", "[1,", "\t|", "! ", '"', "[a](", "*_"])
def test_no_repetition_makes_splitting_slow(unit: str):
    text = unit * 50_000 + "x"
    started = time.process_time()
    for sentence in split_sentences(text):
        clean(sentence)
    # Quadratic time would be minutes; linear time is tens of milliseconds.
    assert time.process_time() - started < 2
