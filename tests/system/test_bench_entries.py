"""The benchmark of entries finds drops at every listener, and costs that can be compared."""

import json

import pytest

from bench.entries import bench_entries
from bench.installation import BenchmarkFailed

pytestmark = [pytest.mark.stack, pytest.mark.timeout(240)]

ROOMS = 6
QUESTIONS = [f"which team booked room {number}" for number in range(ROOMS)]


def history(path, edits):
    lines = [("created", number, 0) for number in range(ROOMS)]
    lines += [("updated", number % ROOMS, 1 + number) for number in range(edits)]
    with path.open("w", encoding="utf-8") as file:
        for seq, (kind, room, team) in enumerate(lines):
            content = f"# Room {room}\n\nThe room {room} is booked by team {team}.\n"
            told = {"seq": seq, "type": kind, "doc_id": f"{room}.md", "path": f"{room}.md", "content": content}
            file.write(json.dumps(told) + "\n")
    return path


async def test_costs_and_drops_are_told(stack, tmp_path):
    said = []
    found = await bench_entries(
        stack,
        history(tmp_path / "history.jsonl", edits=4),
        QUESTIONS,
        edits=2,
        listeners=2,
        say=lambda what, _state: said.append(what),
    )
    assert (found["answers"], found["edits"], found["listeners"]) == (ROOMS, 2, 2)
    assert found["dropped"] >= 2
    assert 0 < found["last_drop_ms"]["min"] <= found["last_drop_ms"]["max"]
    assert found["each_drop_ms"]["max"] == found["last_drop_ms"]["max"]
    for operation in ("near_hit_us", "hit_us", "fill_us", "waited_for_at_a_fill_us"):
        ratio = found[operation]["ratio"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    sizes = found["bytes_per_answer"]
    assert sizes["response"] < sizes["stored"] < sizes["in_redis"]
    assert {"answers", "drops"} <= set(said)


async def test_a_history_with_too_few_edits_is_said(stack, tmp_path):
    with pytest.raises(BenchmarkFailed, match="only 1 edits"):
        await bench_entries(
            stack,
            history(tmp_path / "history.jsonl", edits=1),
            QUESTIONS,
            edits=2,
            listeners=1,
            say=lambda _what, _state: None,
        )
