"""The freshness benchmark measures edits and deletes, also in a single process."""

import json

import pytest

from bench.freshness import bench_freshness
from bench.installation import BenchmarkFailed

pytestmark = [pytest.mark.stack, pytest.mark.timeout(240)]

ROOMS = ("north", "south", "east")
PAGE = (
    "# The {0} room\n\nThe room in the {0} holds a long table, "
    "and it is booked by the team of {1} until the end of summer.\n"
)


def history(path, teams):
    lines = [("created", room, "gardeners") for room in ROOMS]
    lines += [("updated", room, team) for team in teams for room in ROOMS]
    with path.open("w", encoding="utf-8") as file:
        for seq, (kind, room, team) in enumerate(lines):
            event = {"seq": seq, "type": kind, "doc_id": f"{room}.md", "path": f"{room}.md"}
            file.write(json.dumps(event | {"content": PAGE.format(room, team)}) + "\n")
    return path


async def test_edits_and_deletes_are_measured_beside_a_single_process(stack, tmp_path):
    found = await bench_freshness(
        stack, history(tmp_path / "history.jsonl", ("painters", "bakers")), edits=4, overrides={}
    )
    assert (found["documents"], found["edits"], found["deletes"]) == (3, 4, 3)
    for name in ("freshness_ms", "single_process_ms", "deleted_ms"):
        assert 0 < found[name]["min"] <= found[name]["p50"] <= found[name]["p95"] <= found[name]["max"], name
    assert found["ratio_to_single_process"] > 0
    reached = [
        found["stages_ms"][stage]["p50"] for stage in ("accepted", "chunked", "embedded", "searchable", "purged")
    ]
    assert reached == sorted(reached)
    assert found["stages_ms"]["purged"]["min"] <= found["freshness_ms"]["max"]


async def test_a_history_with_too_few_edits_fails(stack, tmp_path):
    with pytest.raises(BenchmarkFailed, match="fewer than 4 edits"):
        await bench_freshness(stack, history(tmp_path / "history.jsonl", ("painters",)), edits=4, overrides={})
