"""The benchmark of cache overhead measures operations and invalidations in every near cache."""

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
            event = {"seq": seq, "type": kind, "doc_id": f"{room}.md", "path": f"{room}.md", "content": content}
            file.write(json.dumps(event) + "\n")
    return path


async def test_overhead_and_invalidations_are_measured(stack, tmp_path):
    reported = []
    found = await bench_entries(
        stack,
        history(tmp_path / "history.jsonl", edits=4),
        QUESTIONS,
        edits=2,
        near_caches=2,
        say=lambda what, _state: reported.append(what),
    )
    assert (found["answers"], found["edits"], found["near_caches"]) == (ROOMS, 2, 2)
    assert found["invalidated"] >= 2
    assert 0 < found["last_invalidation_ms"]["min"] <= found["last_invalidation_ms"]["max"]
    assert found["each_invalidation_ms"]["max"] == found["last_invalidation_ms"]["max"]
    for operation in ("near_cache_hit_us", "hit_us", "fill_us", "fill_wait_us"):
        ratio = found[operation]["ratio"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    sizes = found["bytes_per_answer"]
    assert sizes["response"] < sizes["stored"] < sizes["in_redis"]
    assert {"answers", "invalidations"} <= set(reported)


async def test_a_history_with_too_few_edits_fails(stack, tmp_path):
    with pytest.raises(BenchmarkFailed, match="only 1 edits"):
        await bench_entries(
            stack,
            history(tmp_path / "history.jsonl", edits=1),
            QUESTIONS,
            edits=2,
            near_caches=1,
            say=lambda _what, _state: None,
        )
