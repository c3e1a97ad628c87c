"""Backpressure of an overloaded store: the stream waits, nothing is lost, and memory stays bounded."""

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
    """An HTTP server with one handler; yields its address."""
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
    """A proxy of OpenSearch that answers writes with 429 while ``busy`` is set.

    Attributes:
        busy: whether writes are rejected.
        rejected: number of rejected writes.
    """

    def __init__(self, url):
        self._url = url
        self.busy = False
        self.rejected = 0

    async def handle(self, request):
        if self.busy and request.path.endswith("/_bulk"):
            self.rejected += 1
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
    """Answers as Titan does, and with a ThrottlingException while ``busy`` is set."""

    def __init__(self):
        self.busy = False
        self.rejected = self.embedded = 0

    async def handle(self, request):
        if self.busy:
            self.rejected += 1
            return web.json_response(
                {"message": "Too many requests"}, status=429, headers={"x-amzn-errortype": "ThrottlingException"}
            )
        text = json.loads(await request.read())["inputText"]
        self.embedded += 1
        vector = np.random.default_rng(abs(hash(text))).standard_normal(DIMENSION)
        return web.json_response({"embedding": (vector / np.linalg.norm(vector)).tolist()})


async def waiting_records(installation, *steps):
    """Number of waiting records of the steps."""
    async with StreamAdmin(installation.settings) as admin:
        lags = [await admin.lag(TOPOLOGY[one].reads, installation.settings.names.group(one)) for one in steps]
        return sum(lag.records for some in lags for lag in some)


async def until(check):
    async with asyncio.timeout(LIMIT_S):
        while not await check():  # noqa: ASYNC110 - the state is in other processes
            await asyncio.sleep(0.1)


async def upload(services, prefix):
    """Upload documents; returns the ids of their events."""
    return [
        (
            await services.put(
                f"{prefix}-{number}.md", f"# Room {prefix}\n\nIt has {number} chairs.".encode(), "text/markdown"
            )
        )["event_id"]
        for number in range(DOCUMENTS)
    ]


async def held_back(installation, services, store):
    """Events that wait for the busy store are neither dead letters nor lost, and other steps continue."""
    store.busy = True
    events = await upload(services, "busy")

    async def waits():
        # All records wait for the step that needs the store; the other steps have no waiting records.
        others = await waiting_records(installation, StepName.PREPARE, StepName.INVALIDATE, StepName.NOTIFY)
        return others == 0 and await waiting_records(installation, StepName.INDEX) == DOCUMENTS and store.rejected > 2

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


async def test_an_index_that_answers_429_pauses_only_its_step(stack):
    index = BusyIndex(stack.environment()["FRESHLINE_OPENSEARCH__URL"])
    async with serving(index.handle) as url:
        environment = {"FRESHLINE_KAFKA__PARTITIONS": "3", "FRESHLINE_OPENSEARCH__URL": url}
        async with installed(stack, environment) as installation, connect_services(installation.settings) as services:
            for event_id in await upload(services, "quiet"):
                await services.ended(event_id)
            await held_back(installation, services, index)
            assert (await services.ask("How many chairs has room busy?"))["results"]


async def test_a_model_that_throttles_pauses_only_its_step(stack):
    model = BusyModel()
    async with serving(model.handle) as url:
        environment = {
            "FRESHLINE_KAFKA__PARTITIONS": "3",
            "FRESHLINE_EMBEDDING__PROVIDER": "bedrock",
            "FRESHLINE_EMBEDDING__MODEL": "amazon.titan-embed-text-v2:0",
            "FRESHLINE_EMBEDDING__DIMENSION": str(DIMENSION),
            "FRESHLINE_EMBEDDING__REGION": "us-east-1",
            "AWS_ENDPOINT_URL_BEDROCK_RUNTIME": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }
        async with installed(stack, environment) as installation, connect_services(installation.settings) as services:
            for event_id in await upload(services, "quiet"):
                await services.ended(event_id)
            await held_back(installation, services, model)
            assert model.embedded >= 2 * DOCUMENTS


async def test_memory_of_workers_does_not_grow_with_waiting_records(stack):
    async with installed(stack, {"FRESHLINE_KAFKA__PARTITIONS": "3"}) as installation:
        few, many = [
            await backlog(installation, number, events, lambda _what, _state: None)
            for number, events in enumerate((3_000, 12_000))
        ]
    assert many["max_lag"]["prepare"] > 2 * few["max_lag"]["prepare"] > 0
    for worker, held in many["rss_mib"].items():
        # Workers hold a bounded number of records. Four times as many events may only add state per document.
        assert held["max"] < 1.25 * few["rss_mib"][worker]["max"] + 16, worker
