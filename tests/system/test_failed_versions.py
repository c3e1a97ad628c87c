"""Versions that the index rejects or that fail otherwise, through the APIs of a real installation.

Ingest pipelines make OpenSearch reject marked passages, so that the version is rejected, and marked manifests, so that
it fails.
"""

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Sequence

import httpx
import pytest
from redis.asyncio import Redis

from bench.installation import BenchInstallation, installed
from freshline.services import Services, connect_services
from freshline.verify.run import verify
from infra.local import Stack
from schemas.index import PUBLIC_GROUP

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

GOOD = "# Hotels\n\nA hotel costs {0} dollars.\n"
REJECTED = "# Hotels\n\nA hotel costs UNTAKEN dollars.\n"
FAILING = "# Doomed\n\nA hotel costs nothing.\n"

LONG = "\n## Trains\n\n" + "Trains are paid in the second class. " * 100 + "\n"

PRICE = re.compile(r"hotel costs (\w+) dollars")

PIPELINES = {
    "chunks": "if (ctx.text != null && ctx.text.contains('UNTAKEN')) throw new IllegalArgumentException('marked')",
    "manifests": "if (ctx.manifest?.title == 'Doomed') throw new IllegalArgumentException('marked')",
}


class RejectingInstallation:
    """An installation whose index rejects marked content."""

    def __init__(self, installation: BenchInstallation, services: Services, opensearch: httpx.AsyncClient) -> None:
        self.installation, self.services, self.opensearch = installation, services, opensearch
        names, generation = installation.settings.names, installation.settings.generation
        self.chunks, self.manifests = names.chunks_index(generation), names.manifests_index(generation)

    async def put(self, document_id: str, text: str, **headers: str) -> dict:
        """Upload; returns the response of the acceptance."""
        all_headers = {"content-type": "text/markdown"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        async with httpx.AsyncClient(base_url=self.installation.ingest_url) as client:
            answer = await client.put(f"/v1/documents/{document_id}", content=text.encode(), headers=all_headers)
            return answer.raise_for_status().json()

    async def outcome(self, accepted: dict) -> str:
        return (await self.services.ended(accepted["event_id"]))["outcome"]

    async def found(self, document_id: str, **fields: object) -> list[str]:
        """Prices in the passages found of a document."""
        answer = await self.services.ask("What does a hotel cost?", filters={"document_id": document_id}, **fields)
        return [price for result in answer["results"] for price in PRICE.findall(result["text"])]

    async def stored(self, document_id: str) -> list[dict]:
        """Stored passages of a document, regardless of access."""
        body = {"query": {"term": {"document_id": document_id}}, "size": 100}
        answer = (await self.opensearch.post(f"/{self.chunks}/_search", json=body)).raise_for_status().json()
        return [hit["_source"] for hit in answer["hits"]["hits"]]

    async def manifest(self, document_id: str) -> dict:
        answer = await self.opensearch.get(f"/{self.manifests}/_doc/local%2F{document_id}")
        return answer.raise_for_status().json()["_source"]["manifest"]

    async def lose_manifest(self, document_id: str) -> None:
        (await self.opensearch.delete(f"/{self.manifests}/_doc/local%2F{document_id}")).raise_for_status()

    async def together(self, uploads: Sequence[tuple[str, str]]) -> list[dict]:
        """Upload versions so that the index step takes them in one batch."""
        worker = self.installation.pids["worker index"]
        os.kill(worker, signal.SIGSTOP)
        try:
            accepted = [await self.put(*upload) for upload in uploads]
            async with asyncio.timeout(60):
                for one in accepted:
                    while (await self.services.event(one["event_id"]))["stage"] == "accepted":  # noqa: ASYNC110
                        await asyncio.sleep(0.1)
        finally:
            os.kill(worker, signal.SIGCONT)
        return accepted

    async def empty_redis(self) -> None:
        """Delete all data of this installation from Redis."""
        settings = self.installation.settings
        async with Redis.from_url(settings.redis.url) as redis:
            keys = [key async for key in redis.scan_iter(match=f"*{settings.namespace}*", count=1_000)]
            assert keys
            await redis.delete(*keys)


@pytest.fixture(scope="module")
async def rejecting(stack: Stack) -> AsyncIterator[RejectingInstallation]:
    async with (
        installed(stack, {"FRESHLINE_KAFKA__PARTITIONS": "1", "FRESHLINE_STREAMS__ATTEMPTS": "2"}) as running,
        connect_services(running.settings) as services,
        httpx.AsyncClient(base_url=running.settings.opensearch.url, trust_env=False) as opensearch,
    ):
        rejecting = RejectingInstallation(running, services, opensearch)
        for name, script in PIPELINES.items():
            pipeline, index = f"{running.settings.namespace}-{name}", getattr(rejecting, name)
            body = {"processors": [{"script": {"source": script}}]}
            (await opensearch.put(f"/_ingest/pipeline/{pipeline}", json=body)).raise_for_status()
            (await opensearch.put(f"/{index}/_settings", json={"index.final_pipeline": pipeline})).raise_for_status()
        yield rejecting
        for name in PIPELINES:
            index = getattr(rejecting, name)
            await opensearch.put(f"/{index}/_settings", json={"index.final_pipeline": "_none"})
            await opensearch.delete(f"/_ingest/pipeline/{running.settings.namespace}-{name}")


@pytest.mark.parametrize("bad", [REJECTED, FAILING], ids=["refused", "failed"])
async def test_a_good_version_is_kept_if_a_later_one_in_its_batch_fails(rejecting, bad):
    name = f"together-{len(bad)}.md"
    first = await rejecting.put(name, GOOD.format(100))
    assert await rejecting.outcome(first) == "done"
    good, failed = await rejecting.together([(name, GOOD.format(120)), (name, bad)])
    assert [await rejecting.outcome(one) for one in (good, failed)] == ["done", "dead_letter"]
    assert await rejecting.found(name, min_position=failed["position"]) == ["120"]
    assert PRICE.findall(str(await rejecting.stored(name))) == ["120", "120"], "in the text and in the searched field"
    manifest = await rejecting.manifest(name)
    assert (manifest["complete"], manifest["version"], len(manifest["failed"])) == (True, good["version"], 1)
    later = await rejecting.put(name, GOOD.format(140))
    assert await rejecting.outcome(later) == "done"
    assert await rejecting.found(name) == ["140"]


@pytest.mark.parametrize("bad", [REJECTED, FAILING], ids=["refused", "failed"])
async def test_positions_advance_after_a_failed_version_and_a_loss_of_redis(rejecting, bad):
    name = f"positions-{len(bad)}.md"
    before = await rejecting.put(name, GOOD.format(100))
    assert await rejecting.outcome(before) == "done"
    failed = await rejecting.put(name, bad)
    assert await rejecting.outcome(failed) == "dead_letter"
    other = await rejecting.put("other.md", GOOD.format(len(bad)))
    older = await rejecting.put(name, GOOD.format(1), freshline_revision="1")
    assert [await rejecting.outcome(one) for one in (other, older)] == ["done", "superseded"]
    await rejecting.installation.caught_up(timeout_s=60)
    at = (await rejecting.services.ask("hotel"))["as_of"]["positions"]["0"]
    await rejecting.empty_redis()
    for one in (before, failed, other, older):
        await rejecting.found(name, min_position=one["position"])
    assert (await rejecting.services.ask("hotel"))["as_of"]["positions"]["0"] >= at


@pytest.mark.parametrize("text", [GOOD.format(200), REJECTED], ids=["an upload", "a refused upload"])
async def test_a_delete_after_an_upload_over_a_lost_manifest_leaves_no_passages(rejecting, text):
    name = f"lost-{len(text)}.md"
    assert await rejecting.outcome(await rejecting.put(name, GOOD.format(100) + LONG)) == "done"
    assert len(await rejecting.stored(name)) > 1
    await rejecting.lose_manifest(name)
    narrowed = await rejecting.put(name, text, freshline_groups="board")
    refused = text == REJECTED
    assert await rejecting.outcome(narrowed) == ("dead_letter" if refused else "done")
    groups = {tuple(one["groups"]) for one in await rejecting.stored(name)}
    assert groups == {(PUBLIC_GROUP,) if refused else ("board",)}
    deletion = await rejecting.services.delete(name)
    assert await rejecting.outcome(deletion) == "done"
    assert await rejecting.stored(name) == []
    assert await rejecting.found(name, min_position=deletion["position"]) == []


async def test_a_failed_version_with_fewer_groups_leaves_the_old_groups(rejecting):
    public = await rejecting.put("groups.md", GOOD.format(100))
    assert await rejecting.outcome(public) == "done"
    failed = await rejecting.put("groups.md", GOOD.format(100) + LONG + "UNTAKEN\n", freshline_groups="board")
    assert await rejecting.outcome(failed) == "dead_letter"
    assert await rejecting.found("groups.md", min_position=failed["position"]) == ["100"]
    narrowed = await rejecting.put("groups.md", GOOD.format(100), freshline_groups="board")
    assert await rejecting.outcome(narrowed) == "done"
    assert [one["groups"] for one in await rejecting.stored("groups.md")] == [["board"]]


async def test_the_index_agrees_with_the_stream(rejecting):
    await rejecting.installation.caught_up(timeout_s=60)
    report = await verify(rejecting.installation.settings, repair=False)
    assert report.findings == {}
