"""Traces of questions, as a collector receives them over HTTP."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from infra.opensearch.provision import create_indices
from infra.settings import QuerySettings, Settings, TelemetrySettings
from infra.telemetry.tracing import NO_TRACER, open_tracing
from query.main import serving

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
QUESTION = "Where is the zebra?"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """URL of a collector, and the bodies that it received."""
    got: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            got.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", got
        server.shutdown()
        thread.join()


def spans_of(bodies: list[bytes]) -> dict[str, object]:
    spans = {}
    for body in bodies:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                spans |= {span.name: span for span in scope.spans}
    return spans


@pytest.mark.stack
async def test_a_question_is_one_trace_through_its_stages(settings, collector):
    url, bodies = collector
    traced_settings = settings.model_copy(
        update={
            "query": QuerySettings(port=0),
            "telemetry": TelemetrySettings(otlp_endpoint=f"{url}/v1/traces", sample_ratio=0.0),
        }
    )
    await create_indices(traced_settings)
    async with serving(traced_settings) as address, httpx.AsyncClient(base_url=address, timeout=30) as client:
        sampled = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}
        for path in ("/v1/query", "/v1/answers"):
            body = {"query": QUESTION, "generate": True} if path == "/v1/query" else {"query": f"{QUESTION} Where?"}
            assert (await client.post(path, json=body, headers=sampled)).status_code == 200
        await client.post("/v1/query", json={"query": "one whose sender did not ask for a trace"})
    spans = spans_of(bodies)
    assert {"POST /v1/query", "POST /v1/answers", "embed", "search", "fetch", "generate"} <= spans.keys()
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE_ID}
    roots = {spans[name].span_id for name in ("POST /v1/query", "POST /v1/answers")}
    assert spans["search"].parent_span_id in roots
    assert spans["POST /v1/query"].parent_span_id.hex() == "b7ad6b7169203331"
    attributes = {one.key: one.value for one in spans["POST /v1/query"].attributes}
    assert attributes["http.route"].string_value == "/v1/query"
    assert attributes["http.response.status_code"].int_value == 200
    assert not any(b"zebra" in body for body in bodies)


async def test_without_an_endpoint_there_are_no_traces():
    tracer = open_tracing(Settings(), "query").tracer
    assert tracer is NO_TRACER
    with tracer.start_as_current_span("x") as span:
        assert not span.is_recording()
