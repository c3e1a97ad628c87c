"""One trace from an upload to the dropped answers, over all processes, as an OTLP endpoint receives it."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from bench.installation import installed
from freshline.services import connect_services
from infra.local import Stack

pytestmark = pytest.mark.stack

TRACE = "0af7651916cd43dd8448eb211c80319c"
SENDER = "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    """Collects received spans with the name of their service."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        super().__init__(("127.0.0.1", 0), Receive)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"


class Receive(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        for resource in sent.resource_spans:
            about = {one.key: one.value.string_value for one in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.server.spans += [(about["service.name"], span) for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


async def test_each_upload_is_one_trace_even_if_it_fails(stack: Stack, collector: Collector) -> None:
    environment = {"FRESHLINE_KAFKA__PARTITIONS": "3", "FRESHLINE_TELEMETRY__OTLP_ENDPOINT": collector.url}
    async with installed(stack, environment) as installation, connect_services(installation.settings) as services:
        async with httpx.AsyncClient(base_url=installation.ingest_url) as client:
            headers = {"traceparent": f"00-{TRACE}-{SENDER}-01", "content-type": "text/markdown"}
            accepted = (await client.put("/v1/documents/a.md", content=b"# A\n\nText.\n", headers=headers)).json()
        assert (await services.ended(accepted["event_id"]))["outcome"] == "done"
        broken = await services.put("broken.pdf", b"no PDF", "application/pdf")
        await services.ended(broken["event_id"])
        await installation.caught_up(timeout_s=60)
    # The context ends the processes, which send their remaining spans.
    mine = {span.name: (service, span) for service, span in collector.spans if span.trace_id.hex() == TRACE}
    assert {name: service for name, (service, _) in mine.items()} == {
        "accept": "ingest",
        "prepare": "worker prepare",
        "index": "worker index",
        "invalidate": "worker invalidate",
        "notify": "worker notify",
    }
    chain = [mine[name][1] for name in ("accept", "prepare", "index", "invalidate", "notify")]
    assert [span.parent_span_id.hex() for span in chain] == [SENDER, *(span.span_id.hex() for span in chain[:-1])]
    assert [span.start_time_unix_nano for span in chain] == sorted(span.start_time_unix_nano for span in chain)
    # Questions and readiness checks have their own traces.
    other = [span for service, span in collector.spans if span.trace_id.hex() != TRACE and service != "query"]
    assert len({span.trace_id for span in other}) == 1
    assert sorted(span.name for span in other) == ["accept", "index", "invalidate", "notify", "prepare"]
    [failed] = [span for span in other if span.status.code]
    assert (failed.name, failed.status.message) == ("prepare", "broken")
