"""A store that takes nothing for a while holds the stream back: nothing is lost, and memory stays bounded."""

import asyncio
import json
from contextlib import asynccontextmanager

import httpx
import numpy as np
import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import unused_port

from bench.backlog import backlog
from bench.installation import installed
from freshline.services import connect_services
from freshline.verify.run import verify
from infra.kafka.provision import StreamAdmin
from streams.topology import TOPOLOGY, StepName

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

DOCUMENTS = 30
LIMIT_S = 90
DIMENSION = 256


@asynccontextmanager
async def serving(handler):
    """An HTTP server of one handler; yields its address."""
    app = web.Application(client_max_size=100_000_000)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    port = unused_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


class BusyIndex:
    """Stands before OpenSearch, and answers writes with 429 while it is told to.

    Attributes:
        busy: whether it does.
        refused: how many it has.
    """

    def __init__(self, url):
        self._url = url
        self.busy = False
        self.refused = 0

    async def handle(self, request):
        if self.busy and request.path.endswith("/_bulk"):
            self.refused += 1
            error = {"type": "rejected_execution_exception", "reason": "rejected execution of coordinating operation"}
            return web.json_response({"error": error, "status": 429}, status=429)
        body = await request.read()
        headers = {
            name: value for name, value in request.headers.items() if name.lower() not in {"host", "content-length"}
        }
        async with (
            ClientSession(auto_decompress=False) as http,
            http.request(request.method, f"{self._url}{request.path_qs}", data=body, headers=headers) as answer,
        ):
            kept = {"content-type": answer.headers.get("content-type", "application/json")}
            if encoding := answer.headers.get("content-encoding"):
                kept["content-encoding"] = encoding
            return web.Response(body=await answer.read(), status=answer.status, headers=kept)


class BusyModel:
    """Answers as Titan does, and with a ThrottlingException while it is told to."""

    def __init__(self):
        self.busy = False
        self.refused = self.embedded = 0

    async def handle(self, request):
        if self.busy:
            self.refused += 1
            return web.json_response(
                {"message": "Too many requests"}, status=429, headers={"x-amzn-errortype": "ThrottlingException"}
            )
        text = json.loads(await request.read())["inputText"]
        self.embedded += 1
        vector = np.random.default_rng(abs(hash(text))).standard_normal(DIMENSION)
        return web.json_response({"embedding": (vector / np.linalg.norm(vector)).tolist()})


async def behind(installation, *steps):
    """Records that wait, of some steps."""
    async with StreamAdmin(installation.settings) as admin:
        lags = [await admin.lag(TOPOLOGY[one].reads, installation.settings.names.group(one)) for one in steps]
        return sum(lag.records for some in lags for lag in some)


async def until(check):
    async with asyncio.timeout(LIMIT_S):
        while not await check():  # noqa: ASYNC110 - what is waited for is in other processes
            await asyncio.sleep(0.1)


async def upload(services, prefix):
    """Ids of the events of some documents."""
    return [
        (
            await services.put(
                f"{prefix}-{number}.md", f"# Room {prefix}\n\nIt has {number} chairs.".encode(), "text/markdown"
            )
        )["event_id"]
        for number in range(DOCUMENTS)
    ]


async def held_back(installation, services, store):
    """What waits while the store is busy is neither given up nor lost, and other steps go on."""
    store.busy = True
    events = await upload(services, "busy")

    async def waits():
        # The step that needs the store has all of them before it, and those before and behind it have nothing to do.
        others = await behind(installation, StepName.PREPARE, StepName.INVALIDATE, StepName.NOTIFY)
        return others == 0 and await behind(installation, StepName.INDEX) == DOCUMENTS and store.refused > 2

    await until(waits)
    for event_id in events:
        status = await services.event(event_id)
        assert (status["outcome"], status["stage"]) in {(None, "chunked"), (None, "embedded")}
    store.busy = False
    for event_id in events:
        assert (await services.ended(event_id))["outcome"] == "done"
    await installation.caught_up(timeout_s=LIMIT_S)
    report = await verify(installation.settings, repair=False)
    assert (report.ok, report.documents) == (True, 2 * DOCUMENTS)
    async with httpx.AsyncClient(base_url=installation.ingest_url) as ingest:
        assert (await ingest.get("/v1/dead-letters")).json()["total"] == 0


async def test_an_index_that_answers_429_pauses_its_step_and_nothing_else(stack):
    index = BusyIndex(stack.environment()["FRESHLINE_OPENSEARCH__URL"])
    async with serving(index.handle) as url:
        told = {"FRESHLINE_KAFKA__PARTITIONS": "3", "FRESHLINE_OPENSEARCH__URL": url}
        async with installed(stack, told) as installation, connect_services(installation.settings) as services:
            for event_id in await upload(services, "quiet"):
                await services.ended(event_id)
            await held_back(installation, services, index)
            assert (await services.ask("How many chairs has room busy?"))["results"]


async def test_a_model_that_throttles_pauses_its_step_and_nothing_else(stack):
    model = BusyModel()
    async with serving(model.handle) as url:
        told = {
            "FRESHLINE_KAFKA__PARTITIONS": "3",
            "FRESHLINE_EMBEDDING__PROVIDER": "bedrock",
            "FRESHLINE_EMBEDDING__MODEL": "amazon.titan-embed-text-v2:0",
            "FRESHLINE_EMBEDDING__DIMENSION": str(DIMENSION),
            "FRESHLINE_EMBEDDING__REGION": "us-east-1",
            "AWS_ENDPOINT_URL_BEDROCK_RUNTIME": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }
        async with installed(stack, told) as installation, connect_services(installation.settings) as services:
            for event_id in await upload(services, "quiet"):
                await services.ended(event_id)
            await held_back(installation, services, model)
            assert model.embedded >= 2 * DOCUMENTS


async def test_memory_of_workers_does_not_grow_with_what_waits(stack):
    async with installed(stack, {"FRESHLINE_KAFKA__PARTITIONS": "3"}) as installation:
        few, many = [
            await backlog(installation, number, events, lambda _what, _state: None)
            for number, events in enumerate((3_000, 12_000))
        ]
    assert many["max_lag"]["prepare"] > 2 * few["max_lag"]["prepare"] > 0
    for worker, held in many["rss_mib"].items():
        # What a worker holds is a number of records; four times as many events may cost what is remembered of
        # documents, and no more.
        assert held["max"] < 1.25 * few["rss_mib"][worker]["max"] + 16, worker
