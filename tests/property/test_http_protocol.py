"""Any bytes in any segmentation: each request reaches the application once and complete, and has one response."""

import asyncio
import itertools
import json
import re
from functools import partial

import pytest
import uvicorn
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from uvicorn.server import ServerState

from infra.web.http_protocol import HttpProtocol
from infra.web.inline_responder import InlineProtocol, InlineResponder

QUICK = b"/v1/query"
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
WEBSOCKET = b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
SMUGGLED = b"DELETE /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
PROTOCOLS = ("usual", "inline")


class Transport(asyncio.Transport):
    """Records what is written. The peer may stop reading and disconnect."""

    def __init__(self):
        super().__init__()
        self.written = b""
        self.paused = False
        self.closing = False

    def write(self, data):
        assert not self.closing
        self.written += data

    def close(self):
        self.closing = True

    def is_closing(self):
        return self.closing

    def pause_reading(self):
        self.paused = True

    def resume_reading(self):
        self.paused = False


class Application:
    """Records each request that it has read completely."""

    def __init__(self):
        self.read = []
        self.cut_short = 0

    async def __call__(self, scope, receive, send):
        if scope["path"] == "/refused":  # without reading the body
            await answer(send, 413)
            return
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.cut_short += 1
                await answer(send, 400)
                return
            body += message["body"]
            if not message["more_body"]:
                break
        self.note(scope["method"].encode(), scope["raw_path"], scope["headers"], body)
        await answer(send, 200)

    def respond(self, url, headers, body):
        self.note(b"POST", url, headers, body)
        return b"{}"

    def note(self, method, path, headers, body):
        names = sorted(name.decode() for name, _ in headers if name in {b"authorization", b"x-trailer"})
        self.read.append((method.decode(), path.decode(), body, *names))


async def answer(send, status):
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


class Connection:
    """One connection to a protocol instance that serves ``application``."""

    def __init__(self, kind, application, respond=lambda *_: None):
        self.transport = Transport()
        self.state = ServerState()
        config = uvicorn.Config(application, loop="none", ws="none", lifespan="off", access_log=False, log_config=None)
        make = HttpProtocol
        if kind == "inline":
            make = partial(InlineProtocol, inline=InlineResponder(frozenset({QUICK}), respond))
        self.protocol = make(config=config, server_state=self.state, app_state={})
        self.protocol.connection_made(self.transport)

    async def drain(self):
        """Run the application until it makes no progress with what was sent."""
        before = None
        while before != (now := (len(self.transport.written), len(self.state.tasks), self.transport.paused)):
            before = now
            for _ in range(6):
                await asyncio.sleep(0)

    def lose(self):
        self.transport.closing = True
        self.protocol.connection_lost(None)


async def talk(kind, pieces, *, gone=False, patient=True):
    """Send the pieces; return the application, the statuses of the responses, and whether the connection was closed.

    Args:
        kind: name of the protocol, from ``PROTOCOLS``.
        pieces: sent one after the other, while the protocol reads.
        gone: disconnect after the last piece.
        patient: process each piece completely before sending the next.
    """
    application = Application()
    connection = Connection(kind, application, application.respond)
    transport = connection.transport
    for piece in pieces:
        if patient or transport.paused:
            await connection.drain()
        if transport.closing:
            break
        connection.protocol.data_received(piece)
    await connection.drain()
    closed = transport.closing
    if gone or closed:
        connection.lose()
        await connection.drain()
    connection.protocol._unset_keepalive_if_required()
    for task in connection.state.tasks:
        task.cancel()
    return application, statuses(transport.written), closed


def statuses(written):
    """Statuses of all final responses; fails if other bytes are written between them."""
    found = []
    while written:
        head, _, written = written.partition(b"\r\n\r\n")
        status = int(re.match(rb"HTTP/1\.1 (\d{3}) ", head)[1])
        if status == 100:
            continue
        length = int(re.search(rb"content-length: (\d+)", head)[1])
        if status in {400, 501, 505}:
            assert json.loads(written[:length])["status"] == status
            assert b"connection: close" in head.lower()
        written = written[length:]
        found.append(status)
    return found


def message(method="PUT", path="/d", body=b"", headers=b"", version=b"1.1"):
    line = b"%s %s HTTP/%s\r\nHost: a\r\n" % (method.encode(), path.encode(), version)
    return line + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


def chunked(method="PUT", path="/d", body=b"", headers=b"", trailers=b""):
    line = b"%s %s HTTP/1.1\r\nHost: a\r\n" % (method.encode(), path.encode())
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:3], body[3:]) if part)
    return line + headers + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n" + trailers + b"\r\n"


def both(headers=b""):
    head = b"PUT /d HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\nTransfer-Encoding: chunked\r\n" % (5 + len(SMUGGLED))
    return head + headers + b"\r\n0\r\n\r\n" + SMUGGLED


def two_lengths(headers=b"", second=b"0"):
    body = SMUGGLED
    head = b"PUT /d HTTP/1.1\r\nContent-Length: %d\r\nContent-Length: %s\r\n" % (len(body), second)
    return head + headers + b"\r\n" + body


PUT = ("PUT", "/d", b"# Travel")
ASK = ("POST", "/v1/query", b'{"query": "x"}')
GET = ("GET", "/d", b"")
DELETED = ("DELETE", "/d", b"reason")
EXPECT = b"Expect: 100-continue\r\n"
CASES = {
    "h2c": (message(*PUT, OFFER), [PUT], [200]),
    "h2c chunked": (chunked(*PUT, OFFER), [PUT], [200]),
    "h2c without a body": (message(*GET, OFFER), [GET], [200]),
    "h2c in capitals": (message(*PUT, OFFER.replace(b"Upgrade: h2c", b"UPGRADE: H2C")), [PUT], [200]),
    "h2c for a question": (message(*ASK, OFFER), [ASK], [200]),
    "h2c question, chunked": (chunked(*ASK, OFFER), [ASK], [200]),
    "the body looks like a request": (
        message("PUT", "/d", SMUGGLED, OFFER) + message(*GET),
        [("PUT", "/d", SMUGGLED), GET],
        [200, 200],
    ),
    "pipelined after an offer": (
        message(*PUT, OFFER) + message(*ASK, OFFER) + message(*DELETED, OFFER) + message(*GET),
        [PUT, ASK, DELETED, GET],
        [200] * 4,
    ),
    "an offer after others": (message(*ASK) + message(*GET) + message(*PUT, OFFER), [ASK, GET, PUT], [200] * 3),
    "an offer that expects 100": (message(*PUT, OFFER + EXPECT), [PUT], [200]),
    "an offer of a client of 1.0": (message(*PUT, OFFER, version=b"1.0"), [PUT], [200]),
    "an offer and close": (message(*PUT, OFFER + b"Connection: close\r\n") + SMUGGLED, [PUT], [200]),
    "websocket": (message(*GET, WEBSOCKET), [GET], [200]),
    "websocket with a body": (message(*PUT, WEBSOCKET) + message(*GET), [PUT, GET], [200, 200]),
    "upgrade without connection": (message(*PUT, b"Upgrade: h2c\r\n"), [PUT], [200]),
    "both lengths": (both(), [], [400]),
    "both lengths and an offer": (both(OFFER), [], [400]),
    "two lengths": (two_lengths(), [], [400]),
    "two lengths and an offer": (two_lengths(OFFER), [], [400]),
    "two equal lengths": (two_lengths(second=b"%d" % len(SMUGGLED)), [], [400]),
    "a list of lengths": (message(*PUT, b"Content-Length: 3, 3\r\n"), [], [400]),
    "a signed length": (b"PUT /d HTTP/1.1\r\nContent-Length: +8\r\n\r\n# Travel", [], [400]),
    "unknown coding": (b"PUT /d HTTP/1.1\r\n" + OFFER + b"Transfer-Encoding: gzip\r\n\r\n# Travel", [], [400]),
    "chunked is not last": (b"PUT /d HTTP/1.1\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", [], [400]),
    "line ends without CR": (b"PUT /d HTTP/1.1\nContent-Length: 8\n\n# Travel", [], [400]),
    "a folded header": (message(*PUT, b"X: a\r\n Content-Length: 0\r\n"), [], [400]),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", [], [400]),
    "HTTP/2 at once": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [], [400]),
    "another version": (message(*PUT, version=b"2.0"), [], [505]),
    "1.0 with chunks": (chunked(*PUT).replace(b"HTTP/1.1", b"HTTP/1.0"), [], [400]),
    "1.0 is closed": (message(*PUT, version=b"1.0") + SMUGGLED, [PUT], [200]),
    "1.0 without a length": (b"PUT /d HTTP/1.0\r\n\r\n" + SMUGGLED, [("PUT", "/d", b"")], [200]),
    "a tunnel": (b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n" + SMUGGLED, [], [501]),
    "a tunnel with a body": (b"CONNECT a:443 HTTP/1.1\r\nContent-Length: 8\r\n\r\n# Travel", [], [501]),
    "a tunnel after others": (message(*PUT) + b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", [PUT], [200, 501]),
    "bodies where none is usual": (
        message("GET", "/d", b"x" * 9) + message(*DELETED),
        [("GET", "/d", b"x" * 9), DELETED],
        [200, 200],
    ),
    "close is the end": (message(*PUT, b"Connection: close\r\n") + SMUGGLED, [PUT], [200]),
    "garbage after a request": (message(*PUT) + b"\x00\x01", [PUT], [200, 400]),
    "garbage after a question": (message(*ASK) + b"\x00\x01", [ASK], [200, 400]),
    "garbage after an offer": (message(*PUT, OFFER) + b"\x00\x01" + SMUGGLED, [PUT], [200, 400]),
    "a malformed request among others": (message(*PUT) + both() + message(*GET), [PUT], [200, 400]),
    "a malformed chunk": (chunked(*PUT).replace(b"0\r\n", b"zz\r\n") + SMUGGLED, [], [400]),
    "a malformed chunk after an offer": (chunked(*PUT, OFFER).replace(b"0\r\n", b"zz\r\n"), [], [400]),
    "a malformed chunk of a question": (chunked(*ASK).replace(b"0\r\n", b"zz\r\n"), [], [400]),
    "a malformed chunk after others": (message(*GET) + chunked(*PUT).replace(b"0\r\n", b"zz\r\n"), [GET], [200, 400]),
    "trailers": (
        chunked(*PUT, trailers=b"Authorization: x\r\nX-Trailer: 1\r\n") + message(*GET),
        [PUT, GET],
        [200] * 2,
    ),
    "trailers of a question": (chunked(*ASK, trailers=b"Authorization: x\r\n"), [ASK], [200]),
}


@pytest.mark.parametrize("kind", PROTOCOLS)
@pytest.mark.parametrize("case", CASES)
async def test_segmentation_does_not_affect_requests_and_responses(case, kind):
    raw, requests, expected = CASES[case]
    pieces = [[raw]] + [[raw[:cut], raw[cut:]] for cut in range(1, len(raw))] + [[bytes([byte]) for byte in raw]]
    for patient in (True, False):
        for sent in pieces:
            application, found, _ = await talk(kind, sent, patient=patient)
            assert (application.read, found) == (requests, expected), (patient, sent)


@pytest.mark.parametrize("kind", PROTOCOLS)
@pytest.mark.parametrize("offer", [b"", OFFER, WEBSOCKET, OFFER + EXPECT])
@pytest.mark.parametrize("write", [message, chunked])
@pytest.mark.parametrize("request_", [PUT, ASK, DELETED])
async def test_a_truncated_body_is_not_a_request(kind, offer, write, request_):
    raw = write(*request_, offer)
    for end in range(1, len(raw)):
        for sent in ([raw[:end]], [raw[: end // 2], raw[end // 2 : end]]):
            application, found, _ = await talk(kind, sent, gone=True)
            assert (application.read, found) == ([], []), sent


requests_ = st.tuples(
    st.sampled_from([message, chunked]),
    st.sampled_from(["PUT", "POST", "DELETE", "GET"]),
    st.sampled_from(["/d", QUICK.decode()]),
    st.sampled_from([b"", b"# Travel", SMUGGLED, b"\r\n\r\n", b"0\r\n\r\n", bytes(range(256))]),
    st.sampled_from([b"", OFFER, WEBSOCKET, EXPECT, OFFER + EXPECT]),
)


@examples(max_examples=300, deadline=None)
@given(
    sent=st.lists(requests_, min_size=1, max_size=5),
    cuts=st.lists(st.floats(0, 1, exclude_max=True), max_size=6),
    end=st.sampled_from([b"", b"\x00", both(), both(OFFER)]),
    kind=st.sampled_from(PROTOCOLS),
    patient=st.booleans(),
)
def test_pipelined_requests_in_any_segmentation(sent, cuts, end, kind, patient):
    raw = b"".join(write(*request) for write, *request in sent) + end
    offsets = [0, *sorted(int(cut * len(raw)) for cut in cuts), len(raw)]
    pieces = [raw[start:stop] for start, stop in itertools.pairwise(offsets)]
    application, found, _ = asyncio.run(talk(kind, pieces, patient=patient))
    assert application.read == [(method, path, body) for _, method, path, body, _ in sent]
    assert found == [200] * len(sent) + [400] * bool(end)


@pytest.mark.parametrize("kind", PROTOCOLS)
async def test_bytes_after_a_rejected_request_are_neither_its_body_nor_a_request(kind):
    waits = message("PUT", "/refused", SMUGGLED, EXPECT)[: -len(SMUGGLED)]
    application, found, closed = await talk(kind, [waits, SMUGGLED])
    assert (application.read, found, closed) == ([], [413], True)
    # A client that has begun to send the body sends the rest of it, and may reuse the connection.
    application, found, _ = await talk(kind, [waits + SMUGGLED[:5], SMUGGLED[5:] + message(*GET)])
    assert (application.read, found) == ([GET], [413, 200])


@pytest.mark.parametrize("kind", PROTOCOLS)
async def test_the_malformed_rest_of_a_rejected_body_has_no_response_of_its_own(kind):
    raw = chunked("PUT", "/refused", b"# Travel").replace(b"0\r\n", b"zz\r\n")
    application, found, closed = await talk(kind, [raw[:-10], raw[-10:]])
    assert (application.read, found, closed) == ([], [413], True)


@pytest.mark.parametrize("kind", PROTOCOLS)
async def test_an_http_1_0_client_receives_no_100_continue(kind):
    connection = Connection(kind, Application())
    connection.protocol.data_received(message(*PUT, EXPECT, version=b"1.0"))
    await connection.drain()
    assert connection.transport.written.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("kind", PROTOCOLS)
async def test_a_disconnect_with_pipelined_requests_reaches_the_request_in_progress(kind):
    started, received = asyncio.Event(), []

    async def watching(scope, receive, send):  # noqa: ARG001 - an application
        await receive()
        started.set()
        received.append((await receive())["type"])

    connection = Connection(kind, watching)
    connection.protocol.data_received(message(*GET) + message(*PUT))
    async with asyncio.timeout(10):
        await started.wait()
        connection.lose()
        await asyncio.gather(*connection.state.tasks)
    assert received == ["http.disconnect"]
