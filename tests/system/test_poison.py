"""Undecodable and failing records on every stream of a real installation: dead letters, replay and the rate limit."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial

import httpx
import pytest

from bench.installation import BenchInstallation, installed
from freshline.services import Services, connect_services
from freshline.verify.run import verify
from infra.blobs.port import ref_of
from infra.kafka.codec import encode_event, encode_plan
from infra.kafka.dead_letters import open_dead_letters
from infra.kafka.producer import KafkaProducer
from infra.kafka.provision import StreamAdmin
from infra.kafka.topic_reader import read_to_end
from infra.local import Stack
from infra.settings import Settings
from schemas.dead_letters import DEAD_LETTER_HEADERS
from schemas.events import BlobRef, Change, ChunkPlan, DocumentEvent
from schemas.records import Headers, Record
from schemas.topics import CHUNKS, DEAD_LETTERS, DOCUMENTS, EVENT_ENDS, INDEX_CHANGES
from streams.topology import StepName

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

LOST = ref_of(b"never stored")


@pytest.fixture(scope="module")
async def installation(stack: Stack) -> AsyncIterator[BenchInstallation]:
    async with installed(stack, {"FRESHLINE_KAFKA__PARTITIONS": "3", "FRESHLINE_PARSE__TIMEOUT_S": "120"}) as running:
        yield running


@pytest.fixture
async def services(installation: BenchInstallation) -> AsyncIterator[Services]:
    async with connect_services(installation.settings) as connected:
        yield connected


@pytest.fixture
async def producer(installation: BenchInstallation) -> AsyncIterator[KafkaProducer]:
    producer = await KafkaProducer.open(installation.settings)
    yield producer
    await producer.close()


def event(document_id: str, version: int, content: BlobRef = LOST, **fields: object) -> DocumentEvent:
    return DocumentEvent(
        event_id=f"{document_id}-{version}",
        tenant="local",
        document_id=document_id,
        version=version,
        change=Change.UPSERTED,
        accepted_ms=0,
        content=content,
        content_type="text/markdown",
        **fields,
    )


async def ended(services: Services, event_id: str) -> dict:
    """As ``Services.ended``, with a longer timeout."""
    async with asyncio.timeout(240):
        while (status := await services.event(event_id))["outcome"] is None:  # noqa: ASYNC110 - over HTTP
            await asyncio.sleep(0.1)
    return status


async def dead_letters_by_id(installation: BenchInstallation) -> dict[str, object]:
    """Open dead letters by id."""
    found = await open_dead_letters(partial(read_to_end, installation.settings))
    return {one.dead_letter_id: one for one in found}


def freshline(installation: BenchInstallation, *arguments: str, status: int = 0) -> dict:
    command = [sys.executable, "-m", "freshline", *arguments, "--json"]
    ended = subprocess.run(
        command, env=installation.launcher.environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert ended.returncode == status, (ended.stdout, ended.stderr)
    return json.loads(ended.stdout.splitlines()[-1])


def poison(topic: str) -> list[tuple[bytes, Headers]]:
    """Values and headers that no step can decode."""
    ours = encode_event(event("x.md", 1))
    deep = b'{"event": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    return [
        (b"\xff\x00\xfe", ours.headers),
        (b"", ()),
        (b"{}", ()),
        (b"null", ()),
        (b'{"event_id": "\\ud800\\u0000"}', ()),
        (deep, ()),
        (b"x" * 900_000, (("h" * 1_000, b"\xff" * 90_000),)),
        (ours.value, (("ce_type", b"freshline.document.changed.v9"), ("ce_type", b"again"))),
        (ours.value.replace(b'"version":1', b'"version":-1').replace(b"x.md", topic.encode()), ()),
    ]


async def test_every_step_continues_after_records_that_it_cannot_decode(installation, services, producer):
    sent: dict[str, bytes] = {}
    for topic in (DOCUMENTS, CHUNKS, INDEX_CHANGES, EVENT_ENDS):
        for partition in range(3):
            for value, headers in poison(topic.name)[partition::3]:
                placed = await producer.send(Record(topic.name, b"\xff\x00", value, headers, partition))
                sent[f"{topic.name}-{placed.partition}:{placed.offset}"] = value
    accepted = [
        await services.put(f"after-{number}.md", b"# After\n\nPoison.\n", "text/markdown") for number in range(6)
    ]
    assert [(await services.ended(one["event_id"]))["outcome"] for one in accepted] == ["done"] * 6
    found = await dead_letters_by_id(installation)
    assert {name: one.value for name, one in found.items()} == sent
    for dead_letter in found.values():
        assert dead_letter.kind == "undecodable"
        assert dead_letter.reason
        assert {name for name, _ in dead_letter.headers} >= set(DEAD_LETTER_HEADERS)
    assert (await installation_verified(installation)).ok
    listing = freshline(installation, "dead-letters", "list", "--kind", "undecodable")
    assert (listing["total"], listing["by_step"]) == (36, {"prepare": 9, "index": 9, "invalidate": 9, "notify": 9})
    assert len(freshline(installation, "dead-letters", "drop", "--all")["dropped"]) == 36
    assert await dead_letters_by_id(installation) == {}


async def installation_verified(installation):
    await installation.caught_up(timeout_s=60)
    return await verify(installation.settings, repair=False)


async def test_a_dead_letter_is_superseded_by_later_versions_even_after_a_replay(installation, services, producer):
    placed = await producer.send(encode_event(event("lost.md", 5)))
    name = f"documents.v1-{placed.partition}:{placed.offset}"
    headers = {"content-type": "text/markdown", "freshline-revision": "6"}
    async with httpx.AsyncClient(base_url=installation.ingest_url) as client:
        later = (await client.put("/v1/documents/lost.md", content=b"# Found\n\nSix.\n", headers=headers)).json()
        assert (await services.ended(later["event_id"]))["outcome"] == "done"
        [dead_letter] = (await client.get("/v1/dead-letters", params={"kind": "content-lost"})).json()["dead_letters"]
        assert (dead_letter["dead_letter_id"], dead_letter["document_id"], dead_letter["version"]) == (
            name,
            "lost.md",
            5,
        )
        shown = (await client.get(f"/v1/dead-letters/{name}")).json()
        assert shown["headers"]["__connect.errors.stage"] == "prepare"
        assert shown["headers"]["ce_id"] == "lost.md-5"
        replayed = (await client.post(f"/v1/dead-letters/{name}/replay")).json()
    status = await services.ended(replayed["event_id"])
    # Its content is still lost, so it may become a dead letter again. It never blocks version 6.
    assert status["outcome"] == "dead_letter"
    assert (await services.document("lost.md"))["version"] == 6
    assert "Six." in (await services.ask("Found", filters={"document_id": "lost.md"}))["results"][0]["text"]
    freshline(installation, "dead-letters", "drop", "--all")


async def test_a_replay_succeeds_after_a_repair_and_is_superseded_by_a_newer_version(installation, services, producer):
    blob = ref_of(b"# Mended\n\nThe backup came back.\n")
    for document_id in ("repaired.md", "superseded.md"):
        await producer.send(encode_event(event(document_id, 5, blob)))
    headers = {"content-type": "text/markdown", "freshline-revision": "6"}
    async with httpx.AsyncClient(base_url=installation.ingest_url) as client:
        later = (await client.put("/v1/documents/superseded.md", content=b"Newer.\n", headers=headers)).json()
        await services.ended(later["event_id"])
        await installation.caught_up(timeout_s=60)
        assert (await client.get("/v1/dead-letters")).json()["by_kind"] == {"content-lost": 2}
        # Restore the missing content.
        restored = await services.put("other.md", b"# Mended\n\nThe backup came back.\n", "text/markdown")
        await services.ended(restored["event_id"])
    replayed = freshline(installation, "dead-letters", "replay", "--all", "--kind", "content-lost")["replayed"]
    outcomes = {}
    for one in replayed:
        status = await services.ended(one["event_id"])
        outcomes[status["document_id"]] = status["outcome"]
    assert outcomes == {"repaired.md": "done", "superseded.md": "superseded"}
    assert (await services.document("superseded.md"))["version"] == 6
    assert "backup" in (await services.ask("backup", filters={"document_id": "repaired.md"}))["results"][0]["text"]
    assert await dead_letters_by_id(installation) == {}
    report = await installation_verified(installation)
    assert (report.ok, report.rejected.count) == (True, 0)


async def test_a_plan_without_its_passages_is_a_dead_letter_and_later_versions_are_indexed(
    installation, services, producer
):
    one = event("plan.md", 5)
    plan = ChunkPlan(event=one, position="documents.v1-0:999999", profile="p", chunked_ms=0, chunks_blob=LOST)
    await producer.send(encode_plan(plan, 0))
    accepted = await services.put("plan.md", b"# Plan\n\nA later one.\n", "text/markdown")
    assert (await services.ended(accepted["event_id"]))["outcome"] == "done"
    await installation.caught_up(timeout_s=60)
    [dead_letter] = (await dead_letters_by_id(installation)).values()
    assert (dead_letter.step, dead_letter.kind, dead_letter.event) == ("index", "content-lost", one)
    freshline(installation, "dead-letters", "drop", dead_letter.dead_letter_id)


@pytest.mark.parametrize(
    ("name", "content", "outcome", "reason"),
    [
        ("line.txt", b"word " * 3_990_000, "dead_letter", "characters"),
        ("chunks.md", ("# 章\n\n" + "漢字かな交じり文。" * 20 + "\n\n").encode() * 12_000, "dead_letter", "passages"),
        ("nul.txt", b"Before\x00after the NUL byte.\x00", "done", None),
        ("invalid.txt", b"\xff\xfe\xfa broken \x80\x81 text \xc3\x28 end", "done", None),
        ("empty.md", b"", "done", None),
        ("blank.md", b" \n\t\n", "done", None),
    ],
)
async def test_awkward_text_has_an_outcome_and_the_next_version_is_indexed(services, name, content, outcome, reason):
    content_type = "text/markdown" if name.endswith(".md") else "text/plain"
    accepted = await services.put(name, content, content_type)
    status = await ended(services, accepted["event_id"])
    assert status["outcome"] == outcome, status
    assert reason is None or reason in status["reason"]
    later = await services.put(name, f"The next version of {name}.\n".encode(), content_type)
    assert (await ended(services, later["event_id"]))["outcome"] == "done"
    results = (await services.ask("next version", filters={"document_id": name}))["results"]
    assert [result["text"].strip() for result in results] == [f"The next version of {name}."]


async def test_a_worker_above_the_dead_letter_rate_limit_stops_with_an_error_and_loses_nothing(settings: Settings):
    async with StreamAdmin(settings) as admin:
        await admin.create_topics()
    producer = await KafkaProducer.open(settings)
    for number in range(10):
        await producer.send(Record(DOCUMENTS.name, b"k", b"of a later release %d" % number, (), 0))
    await producer.close()
    environment = os.environ | {"FRESHLINE_STREAMS__DEAD_LETTER_WINDOW": "4", "FRESHLINE_LOG_LEVEL": "error"}
    command = [sys.executable, "-m", "freshline", "worker", "prepare"]
    stopped = await asyncio.to_thread(
        subprocess.run, command, env=environment, capture_output=True, text=True, check=False, timeout=90
    )
    assert stopped.returncode == 1
    assert "prepare would give up 3 of the last" in stopped.stderr.splitlines()[-1]
    assert "nothing is lost" in stopped.stderr
    read = partial(read_to_end, settings)
    dead_letters = len(await open_dead_letters(read))
    assert dead_letters <= 2
    async with StreamAdmin(settings) as admin:
        [lag, *_] = await admin.lag(DOCUMENTS, settings.names.group(StepName.PREPARE))
    assert lag.committed == dead_letters
    # An operator may switch the limit off if the deployment is not at fault.
    environment["FRESHLINE_STREAMS__DEAD_LETTER_RATE"] = "1"
    worker = await asyncio.create_subprocess_exec(*command, env=environment)
    try:
        async with asyncio.timeout(90):
            while len(await open_dead_letters(read)) < 10:  # noqa: ASYNC110 - brokers send no notification
                await asyncio.sleep(0.2)
    finally:
        worker.terminate()
        assert await worker.wait() == 0
    assert [one.offset for one in await open_dead_letters(read)] == list(range(10))
    assert len([one async for one in read_to_end(settings, DEAD_LETTERS)]) == 10
