"""Real workers send the outcome of each event to a real receiver at least once, despite crashes and failures."""

import asyncio
import json
import os
import signal
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from bench.installation import installed
from freshline.services import connect_services
from infra.settings import WebhookSettings
from infra.webhooks.port import NotDelivered
from infra.webhooks.sender import HttpSender
from infra.webhooks.signing import made_secret, signed
from schemas.documents import Outcome
from schemas.webhooks import KeptWebhook, WaitingMessage

LIMIT_S = 60


class Receiver:
    """An HTTP server that records requests and answers with a configurable status.

    Attributes:
        status: status of its responses from now on.
        requests: received requests, as headers by lower-case name, and body.
    """

    def __init__(self):
        self.status = 204
        self.requests = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.requests.append(({name.lower(): value for name, value in self.headers.items()}, body))
                self.send_response(receiver.status)
                self.send_header("location", f"{receiver.url}/elsewhere")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://localhost:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def deliveries(self):
        """Number of messages received for each event."""
        return Counter(headers["webhook-id"] for headers, _ in self.requests)


@pytest.fixture
def receiver():
    running = Receiver()
    yield running
    running.close()


def message():
    return WaitingMessage(webhook_id="0" * 16, message_id="e1", body='{"type":"event.done"}', ended_ms=1)


def webhook(url):
    return KeptWebhook(
        webhook_id="0" * 16,
        tenant="acme",
        url=url,
        secret=made_secret(bytes(32)),
        outcomes=tuple(Outcome),
        created_ms=1,
    )


@pytest.mark.parametrize(
    ("status", "found"),
    [
        (200, None),
        (204, None),
        (302, NotDelivered("the receiver responded with 302")),
        (410, NotDelivered("the receiver responded with 410", is_gone=True)),
        (500, NotDelivered("the receiver responded with 500")),
    ],
)
async def test_a_message_is_delivered_on_a_2xx_status_and_redirects_are_not_followed(receiver, status, found):
    receiver.status = status
    async with HttpSender(WebhookSettings(targets="local")) as sender:
        assert await sender.send(webhook(f"{receiver.url}/hook"), message()) == found
    [(headers, body)] = receiver.requests
    assert body == message().body.encode()
    assert headers["host"] == receiver.url.removeprefix("http://")
    assert (
        headers["webhook-signature"]
        == signed(webhook("").secret, "e1", int(headers["webhook-timestamp"]), body)["webhook-signature"]
    )


@pytest.mark.parametrize("targets", ["public", "private"])
async def test_nothing_is_sent_to_loopback_unless_allowed(receiver, targets):
    async with HttpSender(WebhookSettings(targets=targets)) as sender:
        assert "URL" in (await sender.send(webhook(receiver.url), message())).reason
    assert receiver.requests == []


class Names:
    """A resolver for host names that replaces the one of the machine."""

    def __init__(self, monkeypatch):
        self.addresses: list[str] = []
        self.lookups = 0
        monkeypatch.setattr(socket, "getaddrinfo", self._found)

    def _found(self, host, port, *_arguments, **_more):
        if host[0].isdigit():
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]
        self.lookups += 1
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.addresses]


@pytest.mark.parametrize(
    ("targets", "addresses"),
    [
        ("public", ["127.0.0.1"]),
        ("private", ["127.0.0.1"]),
        ("public", ["10.0.0.7"]),
        ("local", ["169.254.169.254"]),
        ("public", ["93.184.215.14", "127.0.0.1"]),
    ],
)
async def test_a_name_with_a_forbidden_address_is_rejected_before_any_connection(monkeypatch, targets, addresses):
    names = Names(monkeypatch)
    names.addresses = addresses
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0)
        url = f"https://hooks.example:{listening.getsockname()[1]}/"
        async with HttpSender(WebhookSettings(targets=targets, timeout_s=5)) as sender:
            assert "not permitted" in (await sender.send(webhook(url), message())).reason
        with pytest.raises(BlockingIOError):
            listening.accept()
    assert names.lookups == 1


async def test_the_connection_uses_the_checked_address(monkeypatch):
    names = Names(monkeypatch)
    names.addresses = ["127.0.0.1"]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(LIMIT_S)

        def first_bytes():
            connection, _ = listening.accept()
            with connection:
                return connection.recv(4096)

        handshake = asyncio.create_task(asyncio.to_thread(first_bytes))
        url = f"https://hooks.example:{listening.getsockname()[1]}/"
        async with HttpSender(WebhookSettings(targets="local")) as sender:
            assert "failed" in (await sender.send(webhook(url), message())).reason, "the peer is no TLS server"
        assert b"hooks.example" in await handshake, "the TLS handshake requests the name"
    assert names.lookups == 1, "a second lookup might return another address"


async def test_an_unreachable_or_silent_receiver_is_reported():
    async with HttpSender(WebhookSettings(targets="local", timeout_s=0.3)) as sender:
        assert "failed" in (await sender.send(webhook("http://127.0.0.1:9/"), message())).reason
        with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, and never reads
            port = silent.getsockname()[1]
            assert "within 0.3 s" in (await sender.send(webhook(f"http://127.0.0.1:{port}/"), message())).reason


async def eventually(check):
    async with asyncio.timeout(LIMIT_S):
        while not check():  # noqa: ASYNC110 - the state is in other processes
            await asyncio.sleep(0.05)


@pytest.mark.stack
@pytest.mark.timeout(240)
async def test_each_outcome_is_delivered_despite_receiver_failures_and_a_killed_worker(stack, receiver):
    environment = {
        "FRESHLINE_KAFKA__PARTITIONS": "2",
        "FRESHLINE_WEBHOOKS__TARGETS": "local",
        "FRESHLINE_WEBHOOKS__REFRESH_S": "0",
        "FRESHLINE_WEBHOOKS__RETRY_FIRST_S": "0.2",
        "FRESHLINE_WEBHOOKS__RETRY_MAX_S": "1",
    }
    async with (
        installed(stack, environment) as installation,
        connect_services(installation.settings) as services,
        httpx.AsyncClient(base_url=installation.ingest_url, timeout=LIMIT_S) as ingest,
    ):
        made = (await ingest.post("/v1/webhooks", json={"url": f"{receiver.url}/hook"})).json()
        events = {(await services.put("travel.md", b"Hotels cost 120.", "text/markdown"))["event_id"]: "done"}
        await eventually(lambda: receiver.deliveries().keys() == events.keys())
        headers, body = receiver.requests[0]
        assert (
            headers["webhook-signature"]
            == signed(made["secret"], headers["webhook-id"], int(headers["webhook-timestamp"]), body)[
                "webhook-signature"
            ]
        )
        [event_id] = events
        status = (await ingest.get(f"/v1/events/{event_id}")).json()
        data = json.loads(body)["data"]
        assert (data["outcome"], data["position"], data["version"]) == ("done", status["position"], status["version"])
        assert (json.loads(body)["type"], data["stage"]) == ("event.done", "purged")

        receiver.status = 503
        for number in range(8):
            accepted = await services.put(f"doc-{number}.md", f"Trains cost {number}.".encode(), "text/markdown")
            events[accepted["event_id"]] = "done"
        broken = await services.put("broken.pdf", b"%PDF-1.7 not really", "application/pdf")
        events[broken["event_id"]] = "dead_letter"
        await eventually(lambda: len(receiver.requests) > 2)
        os.kill(installation.pids["worker notify"], signal.SIGKILL)
        for number in range(8, 12):
            accepted = await services.put(f"doc-{number}.md", f"Trains cost {number}.".encode(), "text/markdown")
            events[accepted["event_id"]] = "done"
        another = await installation.launcher.start("worker", "notify")
        try:
            receiver.status = 204
            await eventually(lambda: receiver.deliveries().keys() == events.keys())
            await installation.caught_up(timeout_s=LIMIT_S)
        finally:
            another.terminate()
            await another.wait()
        received = {headers["webhook-id"]: json.loads(body) for headers, body in receiver.requests}
        assert {event_id: one["data"]["outcome"] for event_id, one in received.items()} == events
        assert received[broken["event_id"]]["data"]["reason"]
        async with asyncio.timeout(LIMIT_S):
            while (await ingest.get("/v1/webhooks")).json()["webhooks"][0]["state"] != "active":  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        deleted = await ingest.delete(f"/v1/webhooks/{made['webhook']['webhook_id']}")
        assert deleted.status_code == 204
