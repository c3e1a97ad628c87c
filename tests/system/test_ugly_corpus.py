"""Awkward documents of several collections in the parser processes; see docs/ugly-documents.md."""

import csv
import os
import re
from pathlib import Path

import psutil
import pytest

from infra.settings import ParseSettings
from streams.parsing.sandbox import ParseFailed, ParserPool

ROOT = Path(__file__).parents[2]
UGLY = ROOT.parent / "shared" / "corpora" / "ugly"
DISAGREEMENTS = dict(
    re.findall(r"^\| `([^`]+)` \| \w+ \| (\w+) \|", (ROOT / "docs/ugly-documents.md").read_text(), re.MULTILINE)
)
"""File → outcome, if it differs from that which its collection expects."""

FAILURES = {"password": "password", "unsupported": "reject"}
ALLOWED = {
    "text": {"text"},
    "empty_text": {"empty_text"},
    "password": {"password"},
    "reject": {"reject"},
    "no_crash": {"text", "empty_text", "password", "reject", "broken"},
    "bounded": {"text", "empty_text", "password", "reject", "broken"},
}


@pytest.fixture(scope="module")
def expectations() -> dict[str, str]:
    if not UGLY.exists():
        pytest.skip("../shared/corpora/ugly is not here")
    with (UGLY / "manifest.tsv").open() as lines:
        return {row["file"]: row["expect"] for row in csv.DictReader(lines, delimiter="\t")}


async def outcome(pool: ParserPool, name: str, content: bytes) -> str:
    try:
        parsed = await pool.parse(content, None, name)
    except ParseFailed as failure:
        return FAILURES.get(failure.kind, failure.kind)
    return "text" if parsed.text.strip() else "empty_text"


async def test_each_document_ends_as_expected(expectations: dict[str, str]):
    pool = ParserPool(ParseSettings())
    await pool.start()
    outcomes = {name: await outcome(pool, name, (UGLY / name).read_bytes()) for name in expectations}
    parsers = [one for one in psutil.Process(os.getpid()).children() if "streams.parsing.child" in one.cmdline()]
    await pool.close()
    assert len(parsers) == 1, "the pool survived all of them"
    surprises = {name: found for name, found in outcomes.items() if found not in ALLOWED[expectations[name]]}
    assert surprises == DISAGREEMENTS


async def test_wrong_names_and_types_do_not_crash_the_parsers(expectations: dict[str, str]):
    """Each document as every other type, by its content alone and with a wrong name."""
    pool = ParserPool(ParseSettings(cpu_s=5, timeout_s=20))
    await pool.start()
    kinds = set()
    small = [name for name in expectations if (UGLY / name).stat().st_size < 30_000][::4]
    for name in small:
        content = (UGLY / name).read_bytes()
        for lie in (None, "lie.pdf", "lie.docx", "lie.xlsx", "lie.pptx", "lie.epub", "lie.eml", "lie.xml", "lie.csv"):
            try:
                await pool.parse(content, None, lie)
            except ParseFailed as failure:
                kinds.add(failure.kind)
    await pool.close()
    assert {"broken", "unsupported"} <= kinds <= {"broken", "unsupported", "password"}
