"""Front matter: equal attributes and text for all line endings; other text is unchanged."""

import json
import time

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from schemas.content_types import MARKDOWN
from schemas.documents import IndexedMetadata
from schemas.index import metadata_text
from streams.parsing.front_matter import MAX_FRONT_MATTER_CHARS, MAX_METADATA_CHARS, read_front_matter
from streams.parsing.parse import parse

WORDS = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=30)
NAMES = st.text(st.characters(categories=["L", "N"], include_characters="_-. "), min_size=1, max_size=20)
SCALARS = st.one_of(
    WORDS, st.booleans(), st.none(), st.dates(), st.datetimes(), st.integers(), st.floats(), st.just(float("inf"))
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4))
MAPPINGS = st.dictionaries(NAMES | st.sampled_from(["title", "Title", "description", "tags"]), VALUES, min_size=1)
BODIES = st.text(st.characters(categories=["L", "N", "P", "Zs"], include_characters="\n"), max_size=200)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])
METADATA = TypeAdapter(IndexedMetadata)


@given(MAPPINGS, BODIES, ENDS, st.booleans(), st.sampled_from(["---", "..."]))
@settings(deadline=None)
def test_line_endings_do_not_affect_front_matter(mapping, body, end, marked, closing):
    block = yaml.safe_dump(mapping, allow_unicode=True)
    assume("\n---" not in block and "\n..." not in block and len(block) < MAX_FRONT_MATTER_CHARS)
    text = f"---\n{block}{closing}\n{body}"
    expected = parse(text.encode(), MARKDOWN)
    written = text.replace("\n", end).encode("utf-8-sig" if marked else "utf-8")
    parsed = parse(written, MARKDOWN)
    assert parsed == expected
    assert parsed.text.endswith(body)
    METADATA.validate_python(parsed.metadata)
    lowered = {name.strip().casefold(): value for name, value in mapping.items()}
    if len(lowered) < len(mapping):
        return  # which of the same names counts is tested below
    title, description = lowered.get("title"), lowered.get("description")
    if isinstance(title, str) and title.split():
        assert parsed.title == " ".join(title.split())
    if isinstance(description, str):
        assert description.strip() in parsed.text
    elif "summary" not in lowered and (description is None or isinstance(description, list | dict)):
        assert parsed.text == body, "the text does not contain the block"


@pytest.mark.parametrize(
    ("block", "title"),
    [("Title:\ntitle: Bees", "Bees"), ("Title: Bees\ntitle: Wasps", "Bees"), ("TITLE: []\nTitle: 5\ntitle: x", "5")],
)
def test_the_first_text_wins_among_names_that_differ_in_case(block, title):
    assert parse(f"---\n{block}\n---\nbody\n".encode(), MARKDOWN).title == title


@given(st.dictionaries(NAMES.map(str.strip).filter(bool), WORDS.map(str.strip).filter(bool), max_size=30))
def test_text_values_are_metadata_as_written(mapping):
    reserved = {"title", "description", "summary", "tags", "keywords", "categories", "<<"}
    assume(mapping and not {name.casefold() for name in mapping} & reserved)
    found = read_front_matter(f"---\n{yaml.safe_dump(mapping, allow_unicode=True)}---\n")
    assert found.metadata == mapping


@given(st.one_of(BODIES, st.text(st.characters(exclude_characters="\0\r\ufeff", exclude_categories=["Cs"]))))
def test_text_without_front_matter_is_unchanged(text):
    assume(not text.lstrip(" \t\n").startswith(("---", "+++")))
    parsed = parse(text.encode(), MARKDOWN)
    assert (parsed.text, dict(parsed.metadata)) == (text, {})


@given(st.lists(st.sampled_from(["---", "", "+++", "...", "# A", "a: b", "text", "- x", "  ", "***"]), max_size=8))
def test_a_horizontal_rule_is_not_front_matter(lines):
    """Words outside a block of attributes are kept, and no other text is taken for such a block."""
    text = "\n".join(lines)
    parsed = parse(text.encode(), MARKDOWN)
    assert text.endswith(parsed.text)
    taken = text[: len(text) - len(parsed.text)]
    assert "text" not in taken or "a: b" in taken
    assert not taken or {"a: b", "+++"} & set(lines)


@pytest.mark.parametrize(
    "text",
    [
        "---\n\nThe quoll allowance is 40 euros a day.\n\n---\n\n# Rest\n",
        "---\nThe quoll allowance is 40 euros a day.\n---\n# Rest\n",
        "---\n\nNote: the quoll allowance is 40 euros a day.\n\n---\n\n# Rest\n",
        "---\n- a\n- b\n---\nText\n",
        "---\ntitle: a: b\n---\nText\n",
        "---\n# only a comment\n---\nText\n",
        "---\ntitle: open end\n",
        "---\n---\nText\n",
        "----\ntitle: x\n----\nText\n",
        "---\na: b\n--- c\nd: e\n---\nText\n",
        "+++\nno toml\n+++\nText\n",
        "+++\ntitle = 'a'\n---\nText\n",
        "text\n---\ntitle: x\n---\n",
        "---\na: " + "[" * 500 + "]" * 500 + "\n---\nText\n",
        "---\na: \x07\n---\nText\n",
        f"---\na: {'x' * MAX_FRONT_MATTER_CHARS}\n---\nText\n",
    ],
)
def test_a_block_that_is_no_mapping_is_text(text):
    parsed = parse(text.encode(), MARKDOWN)
    assert (parsed.text, dict(parsed.metadata)) == (text, {})


def metadata_of(block: str, fence: str = "---") -> dict:
    return dict(read_front_matter(f"{fence}\n{block}\n{fence}\n").metadata)


def test_values_without_a_json_type_are_text():
    block = (
        "day: 2026-01-02\nat: 2026-01-02 10:00:00\nclock: 12:30\nn: .nan\nbig: 12345678901234567890\nid: 007\nno: no"
    )
    assert metadata_of(block) == {
        "day": "2026-01-02",
        "at": "2026-01-02 10:00:00",
        "clock": "12:30",
        "n": ".nan",
        "big": "12345678901234567890",
        "id": "007",
        "no": "no",
    }
    assert metadata_of("a: 1\nb: -1.5\nc: true\nd: null\ne: '1'\nf: !!str 2\ng: !!python/object:os.system x") == {
        "a": 1, "b": -1.5, "c": True, "e": "1", "f": "2", "g": "x"
    }  # fmt: skip


def test_toml():
    block = 'day = 2026-01-02\nat = 10:00:00\ntags = ["a", "b"]\nn = 1\nf = inf\n[nested]\nx = 1'
    assert metadata_of(block, "+++") == {
        "day": "2026-01-02", "at": "10:00:00", "tags": ("a", "b"), "n": 1, "f": "inf"
    }  # fmt: skip
    parsed = parse(b'\xef\xbb\xbf+++\r\ntitle = \'Pay\'\r\ndescription = """\r\nHow."""\r\n+++\r\nBody', MARKDOWN)
    assert (parsed.title, parsed.text) == ("Pay", "How.\n\nBody")


def test_lists_have_several_values():
    assert metadata_of("tags: [leave, family, leave, '', ~, 3]\nkeywords: a, b ,\nowner:\n- x\n- [y]") == {
        "tags": ("leave", "family", "3"),
        "keywords": ("a", "b"),
        "owner": ("x",),
    }


def test_metadata_is_bounded_and_values_within_the_limits_are_kept():
    many = "\n".join(f"k{number}: {number}" for number in range(100))
    assert len(metadata_of(many)) == 64
    assert metadata_of(f"long: {'x' * 1_001}\n{'n' * 129}: x\n'': x\nok: 1\ndeep: {{a: b}}") == {"ok": 1}
    wide = metadata_of("\n".join(f"k{number}: {'x' * 900}" for number in range(20)))
    assert sum(len(name) + len(metadata_text(value)) for name, value in wide.items()) <= MAX_METADATA_CHARS
    assert wide["k0"] == "x" * 900


@pytest.mark.parametrize(
    "block",
    [
        "a0: &a0 x\n" + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 60)),
        "a0: &a0 {x: 1}\n" + "\n".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 60)),
        "a: &a [*a]",
        "a: " + "[" * 15_000,
        "a: " + "{a: " * 7_000,
        "? " * 15_000,
        "- " * 15_000,
        "a: &b [" + "x, " * 5_000 + "]\n" + "\n".join(f"k{n}: *b" for n in range(1_500)),
        "'" * 30_000,
        'a: "' + "\\x41" * 7_000,
        json.dumps({"a": ["x"] * 5_000}),
        "a" * 1_000 + ": b",
        "&a " * 9_000,
        "!" * 30_000,
        "#" * 30_000,
        "a:\n" + "".join(" " * n + "a:\n" for n in range(1, 240)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("fence", ["---", "+++"])
def test_no_front_matter_is_slow_to_parse(block, fence):
    """It is parsed in the process of the worker, without a timeout."""
    began = time.process_time()
    parsed = parse(f"{fence}\n{block}\n{fence}\nThe text.\n".encode(), MARKDOWN)
    assert time.process_time() - began < 2
    assert parsed.text.endswith("The text.\n")


@pytest.mark.parametrize(
    "block",
    [
        "a." * 3_900 + "a = 1",
        "a." * 15_000 + "a = 1",
        "a = " + "[" * 15_000,
        "a = " + "{a=" * 9_000,
        "a = " + "9" * 20_000,
    ],
)
def test_no_toml_is_slow_to_parse(block):
    began = time.process_time()
    assert parse(f"+++\n{block}\n+++\nThe text.\n".encode(), MARKDOWN).text.endswith("The text.\n")
    assert time.process_time() - began < 2
