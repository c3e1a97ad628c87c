"""Both services with other HTTP clients: the JDK's client, curl, and raw bytes on a socket."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from bench.installation import BenchInstallation, installed
from freshline.services import Services, connect_services
from infra.local import Stack, java
from schemas.positions import Position

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

JDK_CLIENT = Path(__file__).parent / "jdk" / "Documents.java"
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
WEBSOCKET = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
SMUGGLED = b"DELETE /v1/documents/kept.md HTTP/1.1\r\nHost: localhost\r\n\r\n"
OVERRIDES = {"FRESHLINE_KAFKA__PARTITIONS": "1", "FRESHLINE_QUERY__MIN_POSITION_WAIT_S": "60"}
LAST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def curl_offers_http_2() -> bool:
    curl = shutil.which("curl")
    return (
        curl is not None and "HTTP2" in subprocess.run([curl, "-V"], capture_output=True, text=True, check=True).stdout
    )


@pytest.fixture(scope="module")
async def installation(stack: Stack) -> AsyncIterator[BenchInstallation]:
    async with installed(stack, OVERRIDES) as running:
        yield running


@pytest.fixture
async def services(installation: BenchInstallation) -> AsyncIterator[Services]:
    async with connect_services(installation.settings) as connected:
        yield connected


async def exchange(url: str, *pieces: bytes) -> list[tuple[int, bytes]]:
    """Send the pieces to a service, one segment each; returns status and body of all responses until it closes."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    async with asyncio.timeout(60):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)  # makes it a separate segment; no assertion depends on it
        received = await reader.read()
    writer.close()
    responses = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if length is not None:
            responses.append((int(head.split()[1]), received[: int(length[1])]))
            received = received[int(length[1]) :]
    return responses


def put(name: str, body: bytes, headers: bytes = b"", declared: bytes = b"") -> bytes:
    length = declared or b"Content-Length: %d\r\n" % len(body)
    return b"PUT /v1/documents/%s HTTP/1.1\r\nHost: localhost\r\n" % name.encode() + headers + length + b"\r\n" + body


async def passages(services: Services, name: str, position: str, *, question: str = "Who signs?") -> str:
    """Text of the passages found of a document, once the position is applied."""
    found = await services.ask(question, filters={"document_id": name}, min_position=position)
    return " ".join(result["text"] for result in found["results"])


async def test_the_jdk_client_uploads_asks_and_deletes_by_default_and_in_http_1(installation, services):
    command = [java.for_kafka().home / "bin/java", JDK_CLIENT, installation.ingest_url, installation.query_url]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    exchanges = [line.split("\t", 3) for line in done.stdout.splitlines()]
    expected = {"text": 202, "stream": 202, "waiting": 202, "large": 202, "empty": 422, "empty-text": 422}
    expected |= {"ask-1": 200, "ask-2": 200, "delete": 202}
    for mode in ("HTTP_1_1", "HTTP_2"):
        responses = {step: (int(status), body) for of, step, status, body in exchanges if of == mode}
        assert {step: status for step, (status, _) in responses.items()} == expected, done.stdout
        for step in ("ask-1", "ask-2"):
            assert f"The {mode} heron signs." in responses[step][1]
        position = json.loads(responses["delete"][1])["position"]
        assert await passages(services, f"{mode}-text", position) == ""
        for name, animal in (("stream", "heron"), ("waiting", "stoat"), ("large", "lynx")):
            found = await passages(services, f"{mode}-{name}", position, question=f"What does the {animal} do?")
            assert f"The {mode} {animal} signs." in found


@pytest.mark.skipif(not curl_offers_http_2(), reason="curl is not there, or cannot offer HTTP/2")
async def test_curl_with_an_http_2_offer_uploads_its_content(installation, services):
    url = f"{installation.ingest_url}/v1/documents/curl.md"
    command = ["curl", "-sS", "--http2", "-X", "PUT", "--data-binary", "# Curl\n\nThe curlew signs.\n", url]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=True, timeout=60)
    assert "curlew" in await passages(services, "curl.md", json.loads(done.stdout)["position"])


@pytest.mark.parametrize("offer", [OFFER, WEBSOCKET, b""], ids=["h2c", "websocket", "none"])
async def test_a_body_in_a_separate_segment_is_the_body(installation, services, offer):
    name = f"segments-{len(offer)}.md"
    body = b"# Segments\n\nThe pika signs.\n\n" + SMUGGLED
    request = put(name, body, offer)
    for cut in (len(request) - len(body), len(request) - len(SMUGGLED), len(request)):
        responses = await exchange(installation.ingest_url, request[:cut], request[cut:] + LAST)
        assert [status for status, _ in responses] == [202, 200], responses
    text = await passages(services, name, json.loads(responses[0][1])["position"])
    assert "pika" in text
    assert "DELETE /v1/documents/kept.md" in text

    question = json.dumps({"query": "Who signs?", "filters": {"document_id": name}}).encode()
    head = b"POST /v1/query HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head_of_question = head + offer + b"Content-Length: %d\r\n\r\n" % len(question)
    for pieces in (
        (head_of_question, question, LAST),
        (head_of_question + question, LAST),
        (head_of_question + question + head_of_question, question + LAST),
    ):
        responses = await exchange(installation.query_url, *pieces)
        assert [status for status, _ in responses] == [200] * (b"".join(pieces).count(b"Host")), responses
        assert all(b"pika" in answer for _, answer in responses[:-1])


async def test_malformed_and_truncated_requests_change_nothing(installation, services):
    """Each request is sent to an existing document, with a delete of it smuggled into the body."""
    ingest, name = installation.ingest_url, "kept.md"
    text = b"# Kept\n\nThe kestrel signs.\n"
    [(status, accepted), _] = await exchange(ingest, put(name, text, OFFER), LAST)
    assert status == 202
    both = b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n" % (5 + len(SMUGGLED))
    two = b"Content-Length: %d\r\nContent-Length: 0\r\n" % len(SMUGGLED)
    chunks = b"Transfer-Encoding: chunked\r\n"
    tunnel = b"CONNECT a:80 HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED)
    refused = {
        "both": (put(name, b"0\r\n\r\n" + SMUGGLED, declared=both), [400]),
        "both, upgrade": (put(name, b"0\r\n\r\n" + SMUGGLED, OFFER, both), [400]),
        "two": (put(name, SMUGGLED, declared=two), [400]),
        "two, upgrade": (put(name, SMUGGLED, OFFER, two), [400]),
        "chunk": (put(name, b"5\r\n# Cut\r\nzz\r\n" + SMUGGLED, OFFER, chunks), [400]),
        "chunk, later": (put(name, b"5\r\n# Cut\r\n", declared=chunks), [400], b"zz\r\n" + SMUGGLED),
        "tunnel": (tunnel + SMUGGLED, [501]),
        "1.0, chunks": (put(name, b"0\r\n\r\n" + SMUGGLED, declared=chunks).replace(b"/1.1", b"/1.0", 1), [400]),
        "empty": (put(name, b"", OFFER) + LAST, [422, 200]),
        "no length": (put(name, b"", declared=b"X: 1\r\n") + LAST, [422, 200]),
        "empty, chunks": (put(name, b"0\r\n\r\n", declared=chunks) + LAST, [422, 200]),
        "empty text": (put(name, b'{"text": ""}', b"Content-Type: application/json\r\n") + LAST, [422, 200]),
        "garbage behind": (LAST.replace(b"Connection: close\r\n", b"") + b"\x00" + SMUGGLED, [200, 400]),
    }
    for case, (raw, statuses, *later) in refused.items():
        found = [status for status, _ in await exchange(ingest, raw, *later)]
        assert found == statuses, case
    for headers in (b"", OFFER, WEBSOCKET, OFFER + b"Expect: 100-continue\r\n"):
        declared = put(name, b"# Cut", headers, b"Content-Length: 90\r\n")
        for sent in (declared, put(name, b"5\r\n# Cut\r\n", headers, chunks)):
            address = urlsplit(ingest)
            _, writer = await asyncio.open_connection(address.hostname, address.port)
            writer.write(sent)
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    # No other record was sent in between: there is one partition, and the test is its only client.
    marker = await services.put("marker.md", b"# Marker\n\nNobody.\n", "text/markdown")
    before, after = (Position.parse(one["position"]) for one in (json.loads(accepted), marker))
    assert after.offset == before.offset + 1
    assert "kestrel" in await passages(services, name, marker["position"])


async def test_an_empty_file_of_a_folder_is_declared_empty(installation, services, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("one.md", "two.md"):
        (folder / name).write_text(f"# {name}\n\nThe auk signs.\n", encoding="utf-8")
    command = [sys.executable, "-m", "freshline", "ingest", folder, "--wait"]

    async def ingest(code):
        environment = installation.launcher.environment
        done = await asyncio.to_thread(
            subprocess.run, command, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == code, done.stdout + done.stderr

    await ingest(0)
    (folder / "one.md").write_bytes(b"")
    await ingest(4)  # accepted, and listed as a document without passages
    states = {name: await services.document(name) for name in ("one.md", "two.md")}
    assert {name: (state["state"], state["chunks"] > 0) for name, state in states.items()} == {
        "one.md": ("live", False),
        "two.md": ("live", True),
    }
    assert await passages(services, "one.md", states["one.md"]["position"]) == ""
