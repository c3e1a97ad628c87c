"""On real servers, a popular answer that an edit drops is filled by refresh-ahead without a request."""

import asyncio

import pytest

from bench.installation import installed
from freshline.services import connect_services

pytestmark = [pytest.mark.stack, pytest.mark.timeout(180)]

LIMIT_S = 30
POPULAR, RARE = "who booked the blue room", "who waters the plants"


async def test_popular_answers_are_refreshed_ahead_and_others_are_not(stack):
    environment = {"FRESHLINE_KAFKA__PARTITIONS": "2", "FRESHLINE_QUERY__REFRESH_MIN_HITS": "3"}
    async with installed(stack, environment) as installation, connect_services(installation.settings) as services:
        text = "# House\n\nTeam {} booked the blue room. Team {} waters the plants.\n"
        await services.ended((await services.put("a.md", text.format(1, 1).encode(), "text/markdown"))["event_id"])
        for question, times in ((POPULAR, 6), (RARE, 2)):
            for _ in range(times):
                await services.ask(question)
        await services.ended((await services.put("a.md", text.format(2, 2).encode(), "text/markdown"))["event_id"])
        async with asyncio.timeout(LIMIT_S):
            while not (await services.explained(POPULAR))["near"]:  # noqa: ASYNC110 - in other processes
                await asyncio.sleep(0.05)
        assert (await services.explained(POPULAR))["drops"], "the answer was dropped"
        assert (await services.explained(RARE))["stored"] is None
        answer = await services.ask(POPULAR)
        assert answer["cached"]
        assert "Team 2 booked" in answer["results"][0]["text"]
