"""A model with one fact, behind real connections: OpenAI's and Bedrock's protocol, whole and streamed."""

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from zlib import crc32

from infra.generation.port import NO_ANSWER

ON_TOPIC = "How many days of vacation do employees accrue a year?"
FACT = "Employees accrue fifteen days of vacation [2]."


@dataclass
class ModelEndpoint:
    """What the model does.

    Attributes:
        fault: how a stream fails after its first piece: ``cut``, ``throttled`` or ``withheld``.
        status: of the response.
        may_go_on: a stream waits for it after its first piece.
        gone: set when the client has closed its connection before the end.
        asked: bodies of all requests.
    """

    url: str = ""
    fault: str | None = None
    status: int = 200
    may_go_on: Event = field(default_factory=Event)
    gone: Event = field(default_factory=Event)
    asked: list[dict] = field(default_factory=list)


class ModelHandler(BaseHTTPRequestHandler):
    endpoint: ModelEndpoint
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.endpoint.asked.append(request)
        is_bedrock = "/converse" in self.path
        content = request["messages"][-1]["content"]
        user = content[0]["text"] if is_bedrock else content
        text = FACT if ON_TOPIC in user else NO_ANSWER
        if self.endpoint.status != 200:
            self.whole({"message": "no"})
        elif self.path.endswith("/converse-stream"):
            self.streamed("application/vnd.amazon.eventstream", bedrock_frames(text, self.endpoint.fault))
        elif request.get("stream"):
            self.streamed("text/event-stream", openai_events(text, self.endpoint.fault))
        else:
            self.whole(bedrock_reply(text) if is_bedrock else openai_reply(text))

    def whole(self, reply: dict) -> None:
        body = json.dumps(reply).encode()
        self.send_response(self.endpoint.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def streamed(self, content_type: str, pieces: Iterator[bytes]) -> None:
        self.send_response(200)
        self.send_header("content-type", content_type)
        # Stated in a header: a client that is not informed may send its next request on what is being closed.
        self.send_header("connection", "close")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.chunk(next(pieces))
        self.endpoint.may_go_on.wait(20)
        try:
            for piece in pieces:
                self.chunk(piece)
            if self.endpoint.fault != "cut":
                self.chunk(b"")
        except OSError:
            self.endpoint.gone.set()

    def chunk(self, piece: bytes) -> None:
        self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def model_endpoint() -> Iterator[ModelEndpoint]:
    endpoint = ModelEndpoint()
    endpoint.may_go_on.set()
    handler = type("Handler", (ModelHandler,), {"endpoint": endpoint})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        endpoint.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield endpoint
        finally:
            endpoint.may_go_on.set()
            server.shutdown()
            thread.join()


def words(text: str) -> list[str]:
    """Cut so that a citation falls into several pieces."""
    return [text[place : place + 4] for place in range(0, len(text), 4)]


def openai_reply(text: str) -> dict:
    message = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


def openai_events(text: str, fault: str | None) -> Iterator[bytes]:
    def event(**chunk: object) -> bytes:
        return f"data: {json.dumps({'object': 'chat.completion.chunk', **chunk})}\n\n".encode()

    for piece in words(text):
        yield event(choices=[{"index": 0, "delta": {"content": piece}, "finish_reason": None}])
        if fault == "withheld":
            yield event(choices=[{"index": 0, "delta": {}, "finish_reason": "content_filter"}])
        if fault is not None:
            return
    yield event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
    yield event(choices=[], usage={"prompt_tokens": 31, "completion_tokens": 7, "total_tokens": 38})
    yield b": a comment\n\ndata: [DONE]\n\n"


def bedrock_reply(text: str) -> dict:
    return {
        "output": {"message": {"role": "assistant", "content": [{"text": text}]}},
        "stopReason": "end_turn",
        "usage": {"inputTokens": 1, "outputTokens": 1, "totalTokens": 2},
        "metrics": {"latencyMs": 1},
    }


def bedrock_frames(text: str, fault: str | None) -> Iterator[bytes]:
    for piece in words(text):
        yield frame("contentBlockDelta", {"delta": {"text": piece}, "contentBlockIndex": 0})
        if fault == "throttled":
            yield frame("throttlingException", {"message": "slow down"}, kind="exception")
        if fault == "withheld":
            yield frame("messageStop", {"stopReason": "guardrail_intervened"})
        if fault == "cut":
            yield frame("contentBlockDelta", {"delta": {"text": "x"}, "contentBlockIndex": 0})[:-9]
        if fault is not None:
            return
    yield frame("messageStop", {"stopReason": "end_turn"})
    usage = {"inputTokens": 31, "outputTokens": 7, "totalTokens": 38}
    yield frame("metadata", {"usage": usage, "metrics": {"latencyMs": 1}})


def frame(name: str, payload: dict, *, kind: str = "event") -> bytes:
    """A message of AWS's event stream: lengths and their checksum, headers, payload, checksum of all of it."""
    body = json.dumps(payload).encode()
    reported = {":message-type": kind, f":{kind}-type": name, ":content-type": "application/json"}
    headers = b"".join(
        struct.pack("!B", len(key)) + key.encode() + struct.pack("!BH", 7, len(value)) + value.encode()
        for key, value in reported.items()
    )
    prelude = struct.pack("!II", 16 + len(headers) + len(body), len(headers))
    message = prelude + struct.pack("!I", crc32(prelude)) + headers + body
    return message + struct.pack("!I", crc32(message))
