"""On real servers: a hot answer that an edit drops is there again before anybody asks."""

import asyncio

import pytest

from bench.installation import installed
from freshline.services import connect_services

pytestmark = [pytest.mark.stack, pytest.mark.timeout(180)]

LIMIT_S = 30
HOT, COLD = "who booked the blue room", "who waters the plants"


async def test_a_hot_answer_is_filled_again_and_a_cold_one_is_not(stack):
    told = {"FRESHLINE_KAFKA__PARTITIONS": "2", "FRESHLINE_QUERY__REFRESH_MIN_HITS": "3"}
    async with installed(stack, told) as installation, connect_services(installation.settings) as services:
        text = "# House\n\nTeam {} booked the blue room. Team {} waters the plants.\n"
        await services.ended((await services.put("a.md", text.format(1, 1).encode(), "text/markdown"))["event_id"])
        for question, times in ((HOT, 6), (COLD, 2)):
            for _ in range(times):
                await services.ask(question)
        await services.ended((await services.put("a.md", text.format(2, 2).encode(), "text/markdown"))["event_id"])
        async with asyncio.timeout(LIMIT_S):
            while not (await services.explained(HOT))["near"]:  # noqa: ASYNC110 - in other processes
                await asyncio.sleep(0.05)
        assert (await services.explained(HOT))["drops"], "it had been dropped"
        assert (await services.explained(COLD))["stored"] is None
        answer = await services.ask(HOT)
        assert answer["cached"]
        assert "Team 2 booked" in answer["results"][0]["text"]
