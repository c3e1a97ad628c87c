"""Which sentences are picked, and how they read in an answer."""

import pytest

from infra.embedding.hashing import HashingEmbedder
from infra.generation.extractive import ExtractiveGenerator
from infra.generation.port import NO_ANSWER, SourceText
from infra.generation.sentences import clean, split_sentences

HANDBOOK = (
    SourceText(1, "Vacation requests are filed in the HR tool. Managers approve them within two days.", "Leave"),
    SourceText(2, "The office opens at 9 am. Badges are issued at the front desk.", "Office"),
    SourceText(3, "| Kind | Days |\n|---|---|\n| Bereavement | 5 |\n| Jury duty | 10 |", "Kinds of leave"),
)


async def answer(question: str, *sources: SourceText) -> str:
    return (await ExtractiveGenerator().answer(question, sources)).text


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Where do I file a vacation request?", "Vacation requests are filed in the HR tool. [1]"),
        ("When does the office open?", "The office opens at 9 am. [2]"),
        ("jury duty", "Jury duty, 10. [3]"),
        (
            "When does the office open and where are vacation requests filed?",
            "Vacation requests are filed in the HR tool. [1] The office opens at 9 am. [2]",
        ),
        ("What is the boiling point of water?", NO_ANSWER),
        ("?!", NO_ANSWER),
    ],
)
async def test_the_sentences_that_answer_are_picked(question: str, expected: str):
    assert await answer(question, *HANDBOOK) == expected


async def test_one_common_word_does_not_make_a_source_relevant():
    assert await answer("Which day was the moon landing broadcast on television?", *HANDBOOK) == NO_ANSWER


async def test_the_light_of_the_source_decides_between_equal_sentences():
    sources = (SourceText(1, "It takes five days.", "Parcels"), SourceText(2, "It takes five days.", "Refunds"))
    assert await answer("How many days do refunds take?", *sources) == "It takes five days. [2]"


async def test_the_best_sentence_leads_and_its_source_is_finished_first():
    sources = (
        SourceText(1, "Badges cost ten dollars.", None),
        SourceText(2, "Parking is free. Lost garage keys and lockers need a form.", None),
    )
    expected = "Parking is free. [2] Lost garage keys and lockers need a form. [2] Badges cost ten dollars. [1]"
    assert await answer("parking, badges, lost garage keys and lockers", *sources) == expected


async def test_a_sentence_without_end_loses_to_a_short_one_with_the_same_words():
    endless = SourceText(1, "refunds take a week " + " ".join(f"word{number}" for number in range(200)), None)
    assert await answer("Do refunds take a week?", endless, SourceText(2, "Refunds take a week.", None)) == (
        "Refunds take a week. [2]"
    )


async def test_no_more_than_three_sentences():
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]
    text = " ".join(f"{word.title()} is here." for word in words)
    assert (await answer(" ".join(words), SourceText(1, text), SourceText(2, "Alpha beta."))).count("[") == 3


async def test_vectors_order_what_words_leave_open():
    sources = (SourceText(1, "Refunds are green."), SourceText(2, "Refunds are money."))
    embedder = HashingEmbedder()
    generator = ExtractiveGenerator(embedder)
    vector = await embedder.embed_query("money")
    assert (await generator.answer("refunds", sources)).citations[0].source == 1
    assert (await generator.answer("refunds", sources, vector)).citations[0].source == 2


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Dr. Smith came, e.g. by car. He left.", ["Dr. Smith came, e.g. by car.", "He left."]),
        ("# Head\n\nOne. Two!\nThree\nlines", ["One.", "Two!", "Three\nlines"]),
        ("- [x] done\n- open\n  still open\n1. first", ["done", "open\n  still open", "first"]),
        ("before\n```\ncode. Code.\n```\nafter", ["before", "after"]),
        ("> Quoted. Twice.\n> More", ["Quoted.", "Twice.", "More"]),
        ("text\n| a | b |\n|---|:-:|\n| c | d |\ntext", ["text", "| a | b |", "| c | d |", "text"]),
        ("version 1.5 is out. 2 are left.", ["version 1.5 is out.", "2 are left."]),
        ("one\n\n---\n\ntwo", ["one", "two"]),
        ("  # Head\n  one\n  ~~~\n  code\n  ~~~\n", ["one"]),
    ],
)
def test_markdown_is_split_at_its_own_seams(text: str, sentences: list[str]):
    assert split_sentences(text) == sentences


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("see [the form](a/b.md) and ![logo](x.png) now.", "see the form and now."),
        ("as shown [12].", "as shown (12)."),
        ("a **bold word", "a bold word."),
        ("a **bold** `code` word!", "a **bold** `code` word!"),
        ("soft\n  wrapped", "soft wrapped."),
        ('he said "no."', 'he said "no."'),
    ],
)
def test_a_picked_sentence_is_clean_markdown(sentence: str, expected: str):
    assert clean(sentence) == expected
