"""What a dry run tells is what the edit then does, on real servers; and it does nothing itself."""

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
    told = {
        "FRESHLINE_KAFKA__PARTITIONS": "2",
        "FRESHLINE_OPENSEARCH__SHARDS": "1",
        # So long that a passage can have one word very often.
        "FRESHLINE_SPLIT__CHUNK_TOKENS": "2000",
        # What is dropped is to stay away until it is looked at.
        "FRESHLINE_QUERY__REFRESHES_PER_S": "0",
    }
    async with installed(stack, told) as running:
        yield running


@pytest.fixture
async def services(installation):
    async with connect_services(installation.settings) as connected:
        yield connected


async def cached(services):
    """Which questions have their answers in the cache; asks, and so fills."""
    return {text for text in QUESTIONS if (await services.ask(text, top_k=3, generate=False))["cached"]}


async def run(installation, *arguments, content=None, tmp_path=None):
    """The command, as an operator runs it."""
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


async def test_what_is_told_is_what_is_dropped(installation, services, tmp_path):
    for number in range(ROOMS):
        await services.put(f"room-{number}.md", room(number, number).encode(), "text/markdown")
    await installation.caught_up(timeout_s=60)
    await cached(services)
    assert await cached(services) == set(QUESTIONS)

    edit = room(3, 3) + "\n# Coffee\n\nWhoever booked it drinks coffee there.\n"
    told = await run(installation, "--id", "room-3.md", content=edit, tmp_path=tmp_path)
    assert await cached(services) == set(QUESTIONS), "a dry run drops nothing"
    assert (await services.document("room-3.md"))["version"] == told["version"] - 1
    assert (told["document_id"], told["answers"]) == ("room-3.md", len(QUESTIONS))
    assert told["added"] >= 1
    certain = {one["question"] for one in told["affected"] if one["reason"] != "uncertain"}
    assert "who drinks coffee" in certain
    assert certain < set(QUESTIONS)

    await services.ended((await services.put("room-3.md", edit.encode(), "text/markdown"))["event_id"])
    assert set(QUESTIONS) - await cached(services) == certain

    await cached(services)
    told = await run(installation, "--delete", "room-7.md")
    assert (told["added"], told["kept"]) == (0, 0)
    assert told["removed"] >= 1
    certain = {one["question"] for one in told["affected"]}
    assert {one["reason"] for one in told["affected"]} == {"source_changed"}
    await services.ended((await services.delete("room-7.md"))["event_id"])
    assert set(QUESTIONS) - await cached(services) == certain


async def test_the_same_content_changes_nothing_and_what_cannot_be_read_is_said(installation, services):
    text = room(5, 5).encode()
    await services.ended((await services.put("room-5.md", text, "text/markdown"))["event_id"])
    found = await dry_run(installation.settings, "room-5.md", text, file_name="room-5.md")
    assert (found.added, found.removed, found.affected) == (0, 0, ())
    assert found.kept >= 1
    with pytest.raises(Unprocessable):
        await dry_run(installation.settings, "broken.pdf", b"%PDF-1.7 not really", file_name="broken.pdf")


HERD = 60
OFTEN = 1_900
"""More often than one byte counts. With a byte's 255, so long a passage would come behind all of the herd."""


async def test_a_word_that_an_edit_repeats_counts_as_often_as_the_search_counts_it(installation, services, tmp_path):
    """The herd fills the 50 candidates of the lexical leg, and the answer has 50 results.

    At most 49 of the herd are among the candidates of both legs once the edit is first in the lexical one, so it is
    among the results whatever its vector is.
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
    told = await run(installation, str(tmp_path / "edit.txt"), "--id", "zebras.txt")
    [touched] = [one for one in told["affected"] if one["question"] == "zebra"]
    assert (touched["reason"], touched["lexical_rank"]) == ("enters_results", 1)

    await services.ended((await services.put("zebras.txt", edit.encode(), "text/plain"))["event_id"])
    after = await services.ask("zebra", **question)
    assert "zebras.txt" in {one["document_id"] for one in after["results"]}
    assert not after["cached"]
