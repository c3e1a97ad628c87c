"""On real servers, a dry run reports what the edit then does, and changes nothing."""

import asyncio
import json
import os
import sys

import pytest

from bench.installation import installed
from freshline.dry_run import dry_run
from freshline.services import connect_services
from streams.dry_run import Unprocessable

pytestmark = [pytest.mark.stack, pytest.mark.timeout(240)]

ROOMS = 12
QUESTIONS = [f"which team booked room {number}" for number in range(ROOMS)] + ["who drinks coffee", "hotel in Berlin"]


def room(number, team):
    return f"# Room {number}\n\nThe room {number} is booked by team {team}.\n"


@pytest.fixture(scope="module")
async def installation(stack):
    environment = {
        "FRESHLINE_KAFKA__PARTITIONS": "2",
        "FRESHLINE_OPENSEARCH__SHARDS": "1",
        # Long enough for passages with very many occurrences of one word.
        "FRESHLINE_SPLIT__CHUNK_TOKENS": "2000",
        # Dropped answers must not be filled before the test reads them.
        "FRESHLINE_QUERY__REFRESHES_PER_S": "0",
    }
    async with installed(stack, environment) as running:
        yield running


@pytest.fixture
async def services(installation):
    async with connect_services(installation.settings) as connected:
        yield connected


async def cached(services):
    """Questions that are answered from the cache. The others are filled."""
    return {text for text in QUESTIONS if (await services.ask(text, top_k=3, generate=False))["cached"]}


async def run(installation, *arguments, content=None, tmp_path=None):
    """Run the command as an operator does; returns its JSON."""
    if content is not None:
        (tmp_path / "edit.md").write_text(content, encoding="utf-8")
        arguments = (str(tmp_path / "edit.md"), *arguments)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "freshline",
        "dry-run",
        *arguments,
        "--json",
        env=os.environ | dict(installation.launcher.environment),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return json.loads(out.splitlines()[-1])


async def test_the_reported_answers_are_those_that_the_edit_drops(installation, services, tmp_path):
    for number in range(ROOMS):
        await services.put(f"room-{number}.md", room(number, number).encode(), "text/markdown")
    await installation.caught_up(timeout_s=60)
    await cached(services)
    assert await cached(services) == set(QUESTIONS)

    edit = room(3, 3) + "\n# Coffee\n\nWhoever booked it drinks coffee there.\n"
    report = await run(installation, "--id", "room-3.md", content=edit, tmp_path=tmp_path)
    assert await cached(services) == set(QUESTIONS), "a dry run drops nothing"
    assert (await services.document("room-3.md"))["version"] == report["version"] - 1
    assert (report["document_id"], report["answers"]) == ("room-3.md", len(QUESTIONS))
    assert report["added"] >= 1
    certain = {one["question"] for one in report["affected"] if one["reason"] != "uncertain"}
    assert "who drinks coffee" in certain
    assert certain < set(QUESTIONS)

    await services.ended((await services.put("room-3.md", edit.encode(), "text/markdown"))["event_id"])
    assert set(QUESTIONS) - await cached(services) == certain

    await cached(services)
    report = await run(installation, "--delete", "room-7.md")
    assert (report["added"], report["kept"]) == (0, 0)
    assert report["removed"] >= 1
    certain = {one["question"] for one in report["affected"]}
    assert {one["reason"] for one in report["affected"]} == {"source_changed"}
    await services.ended((await services.delete("room-7.md"))["event_id"])
    assert set(QUESTIONS) - await cached(services) == certain


async def test_unchanged_content_affects_nothing_and_unreadable_content_is_reported(installation, services):
    text = room(5, 5).encode()
    await services.ended((await services.put("room-5.md", text, "text/markdown"))["event_id"])
    found = await dry_run(installation.settings, "room-5.md", text, file_name="room-5.md")
    assert (found.added, found.removed, found.affected) == (0, 0, ())
    assert found.kept >= 1
    with pytest.raises(Unprocessable):
        await dry_run(installation.settings, "broken.pdf", b"%PDF-1.7 not really", file_name="broken.pdf")


HERD = 60
OFTEN = 1_900
"""More than a one-byte counter holds. Counted as 255, so long a passage would rank below the entire herd."""


async def test_term_frequencies_of_an_edit_are_counted_as_the_search_counts_them(installation, services, tmp_path):
    """The herd fills the 50 candidates of the lexical retriever, and the answer has 50 results.

    Once the edit ranks first in the lexical retriever, at most 49 of the herd are candidates of both retrievers, so the
    edit is among the results for any vector.
    """
    question = {"top_k": 50, "generate": False}
    for number in range(HERD):
        await services.put(
            f"herd-{number}.txt",
            f"Shelf {number} lends books on trains and taxes. {'zebra ' * (20 + number)}".encode(),
            "text/plain",
        )
    await installation.caught_up(timeout_s=60)
    before = [await services.ask("zebra", **question) for _ in range(2)]
    assert before[1]["cached"]
    assert {one["document_id"][:5] for one in before[1]["results"]} == {"herd-"}

    edit = "zebra " * OFTEN
    (tmp_path / "edit.txt").write_text(edit)
    report = await run(installation, str(tmp_path / "edit.txt"), "--id", "zebras.txt")
    [affected] = [one for one in report["affected"] if one["question"] == "zebra"]
    assert (affected["reason"], affected["lexical_rank"]) == ("enters_results", 1)

    await services.ended((await services.put("zebras.txt", edit.encode(), "text/plain"))["event_id"])
    after = await services.ask("zebra", **question)
    assert "zebras.txt" in {one["document_id"] for one in after["results"]}
    assert not after["cached"]
