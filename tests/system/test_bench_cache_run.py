"""The cache benchmark on real servers, with a short history."""

import json

import pytest

from bench.cache import POLICIES, bench_cache

pytestmark = pytest.mark.stack

TEXTS = {
    "leave": "# Leave\n\nAsk your lead for paid leave two weeks before.\n",
    "travel": "# Travel\n\nYou may work from abroad for thirty days a year.\n",
    "desk": "# Desks\n\nBook a desk in the office the day before.\n",
    "laptop": "# Laptops\n\nA broken laptop goes to the help desk.\n",
    "budget": "# Budget\n\nBooks and courses are paid from the budget for learning.\n",
    "visa": "# Visa\n\nThe travel team helps with a visa.\n",
}
QUESTIONS = ["How long may I work from abroad?", "Who helps with a visa?", "How do I book a desk?"]


async def test_every_policy_is_compared_along_one_history(stack, tmp_path):
    lines = [("created", name, text) for name, text in TEXTS.items()]
    lines += [
        ("updated", "travel", "# Travel\n\nYou may work from abroad for sixty days a year.\n"),
        ("created", "abroad", "# Abroad\n\nHow long you may work from abroad depends on your visa.\n"),
        ("renamed", "laptop", None),
        ("deleted", "desk", None),
    ]
    events = tmp_path / "events.jsonl"
    with events.open("w") as file:
        for seq, (kind, name, text) in enumerate(lines):
            event = {"seq": seq, "type": kind, "doc_id": name, "path": f"{name}-{seq}.md"}
            file.write(json.dumps(event | ({} if text is None else {"content": text})) + "\n")
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"text": text}) + "\n" for text in QUESTIONS))
    reported = []
    results = await bench_cache(
        stack, events, [questions], requests=100, say=lambda what, state: reported.append((what, state))
    )
    figures = {one["policy"]: one for one in results}
    assert tuple(figures) == POLICIES
    assert reported[-1][0] == "edit 4 of 4"
    for one in results:
        assert (one["compared"], one["requests"], one["documents"], one["edits"]) == (4 * 3, 100, 6, 4)
        assert one["passages"] == 6
        assert one["real_search_agreement_rate"] == 1
        assert len(one["stale_rate_after_each_edit"]) == 4
    assert figures["none"]["content_stale_rate"] > 0.5
    assert figures["all"]["invalidations"] == 12
    assert figures["exact"]["content_stale_rate"] == figures["exact"]["slo_violations"] == 0
    assert figures["exact"]["recall"] == figures["all"]["recall"] == 1
