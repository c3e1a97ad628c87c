"""Asked three times what it can answer, the service goes on answering, refuses the rest, and is well right afterwards.

What is compared are rates of one run, so a slow machine is no failure.
"""

import itertools

import orjson
import psutil
import pytest

from bench.installation import installed
from bench.overload import overload
from freshline.services import connect_services, query_target

pytestmark = pytest.mark.stack

DOCUMENTS = 40
SECONDS = 10
GROWTH_BYTES = 150_000_000


@pytest.mark.timeout(240)
async def test_three_times_its_capacity_does_not_bring_it_down(stack):
    told = {"FRESHLINE_OPENSEARCH__SHARDS": "1", "FRESHLINE_KAFKA__PARTITIONS": "1"}
    async with installed(stack, told) as installation, connect_services(installation.settings) as services:
        for number in range(DOCUMENTS):
            text = f"# Room {number}\n\nThe room {number} is booked by team {number * 7}.\n"
            await services.put(f"room-{number}.md", text.encode(), "text/markdown")
        await installation.caught_up(timeout_s=60)
        target = query_target(installation.settings)
        numbers = itertools.count()
        process = psutil.Process(installation.pids["serve query"])
        found = await overload(
            target,
            lambda: target.request(orjson.dumps({"query": f"who booked room {next(numbers)}?"})),
            times=3,
            seconds=SECONDS,
            warm_s=SECONDS / 8,
            rss_bytes=lambda: process.memory_info().rss,
            say=lambda _what, _state: None,
        )
    statuses = found["overload"]["statuses"]
    assert set(statuses) <= {"200", "503"}, found["overload"]["first_failure"]
    assert statuses["503"] > 0
    assert found["goodput_share"] > 0.6
    assert found["admitted_p99_ms"] < 3_000
    assert found["recovered_after_s"] is not None
    assert found["grown_bytes"] < GROWTH_BYTES
