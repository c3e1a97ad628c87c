"""The ingest API on twins: what it takes, what it refuses and how."""

import asyncio
import base64

import httpx
import orjson
import pytest
from prometheus_client import CollectorRegistry

from infra.blobs.memory import MemoryBlobStore
from infra.kafka.codec import decode, encode_ended, encode_event, header
from infra.kafka.dead_letters import encode_dead_letter
from infra.kafka.memory import MemoryStreams
from infra.kafka.port import StreamUnavailable
from infra.redis.memory_answers import MemoryAnswerCache
from infra.redis.memory_states import MemoryEventStates, MemoryVersions
from infra.redis.port import Progress
from infra.settings import IngestSettings, ParseSettings, Settings
from infra.web.credentials import Credentials
from infra.webhooks.memory import MemoryWebhooks
from ingest.accept import Stores
from ingest.api import build_api
from ingest.batches import NDJSON
from ingest.connectors.encoding import header_value
from ingest.dead_letters import DeadLetterQueue
from ingest.event_log import EventLog
from ingest.events_api import POLL_S, follow
from schemas.documents import MAX_EVENTS_PER_REQUEST, DocumentKey, EventStatus, LifeState, Outcome, Stage
from schemas.events import Change, DocumentEvent, EventEnded
from schemas.index import Manifest
from schemas.positions import Position
from schemas.problems import PROBLEM_MEDIA_TYPE, Problem
from schemas.records import Record
from schemas.topics import DEAD_LETTERS, DOCUMENTS

MAX_BYTES = 1_000
SETTINGS = Settings(
    parse=ParseSettings(max_bytes=MAX_BYTES), ingest=IngestSettings(max_batch_items=5, max_batch_bytes=10_000)
)
PDF = "application/pdf"


class Index:
    def __init__(self):
        self.known: dict[DocumentKey, Manifest] = {}
        self.found: dict[DocumentKey, int] = {}

    async def manifests(self, keys):
        return {key: self.known[key] for key in keys if key in self.known}

    async def count_chunks(self, key):
        return self.found.get(key, 0)

    async def live_documents(self, tenant, *, connector, after, limit):
        self.listed = (tenant, connector, after, limit)
        return [manifest for key, manifest in sorted(self.known.items()) if after is None or key.document_id > after][
            :limit
        ]


class World:
    def __init__(self):
        self.streams = MemoryStreams(partitions=3)
        self.blobs = MemoryBlobStore()
        self.states = MemoryEventStates()
        self.index = Index()
        self.answers = MemoryAnswerCache()
        self.failing: set[str] = set()
        self.read_fails = False
        self.reading, self.may_read = asyncio.Event(), asyncio.Event()
        self.may_read.set()
        stores = Stores(
            self.blobs,
            self.streams,
            MemoryVersions(),
            self.states,
            self.index,
            self.answers,
            self.read_partition,
            self.streams,
        )
        self.webhooks = MemoryWebhooks()
        self.app = build_api(
            SETTINGS,
            stores,
            DeadLetterQueue(self.streams.read_to_end, self.streams, EventLog(self.streams, self.states)),
            self.webhooks,
            credentials=Credentials(SETTINGS),
            required={"kafka": self.check("kafka"), "blobs": self.check("blobs")},
            useful={"redis": self.check("redis")},
            registry=CollectorRegistry(),
        )

    def check(self, name):
        async def run():
            if name in self.failing:
                raise ConnectionError(name)

        return run

    async def read_partition(self, *where, **since):
        if self.read_fails:
            raise StreamUnavailable("down")
        self.reading.set()
        await self.may_read.wait()
        async for record in self.streams.read_partition(*where, **since):
            yield record

    @property
    def records(self):
        return [record for lane in self.streams.log.values() for record in lane]

    @property
    def event(self) -> DocumentEvent:
        (record,) = self.records
        return decode(DocumentEvent, record.value, record.headers)

    async def content(self) -> bytes:
        return await self.blobs.get(self.event.content)


@pytest.fixture
def world():
    return World()


@pytest.fixture
async def client(world):
    transport = httpx.ASGITransport(world.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


def problem_of(response: httpx.Response, status: int) -> Problem:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM_MEDIA_TYPE
    return Problem.model_validate_json(response.content)


def fields_of(response: httpx.Response) -> list[str]:
    return [error.field for error in problem_of(response, 422).errors]


async def test_raw_body_with_attributes_in_headers(world, client):
    headers = {
        "Content-Type": "text/plain; charset=utf-8",
        "Freshline-Title": "UTF-8''%D0%97%D0%B0%D0%B3%D0%BE%D0%BB%D0%BE%D0%B2%D0%BE%D0%BA",
        "Freshline-Source": "https://example.org/a?b=%20",
        "Freshline-Groups": "staff, board",
        "Freshline-Metadata": '{"year": 2024, "draft": false, "who": "x"}',
        "Freshline-Revision": "12",
        "Freshline-File-Name": "100% sure.txt",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }
    response = await client.put("/v1/documents/team/a%20b.txt", content=b"Text", headers=headers)
    assert response.status_code == 202
    event = world.event
    accepted = response.json()
    assert response.headers["location"] == f"/v1/events/{event.event_id}"
    assert accepted["document_id"] == event.document_id == "team/a b.txt"
    assert (event.tenant, event.version, event.content_type) == ("local", 12, "text/plain; charset=utf-8")
    assert (event.title, event.source) == ("Заголовок", "https://example.org/a?b=%20")
    assert (event.groups, event.file_name) == (("staff", "board"), "100% sure.txt")
    assert event.metadata == {"year": 2024, "draft": False, "who": "x"}
    assert await world.content() == b"Text"
    assert header(world.records[0].headers, "traceparent") == headers["traceparent"]


async def test_bare_utf8_header_is_read_too(world, client):
    await client.put("/v1/documents/a.md", content=b"x", headers={"Freshline-Title": "Größe".encode()})
    assert world.event.title == "Größe"


async def test_malformed_trace_is_not_passed_on(world, client):
    await client.put("/v1/documents/a.md", content=b"x", headers={"traceparent": "00-zz\x7f"})
    assert header(world.records[0].headers, "traceparent") is None


async def test_json_body(world, client):
    body = {"text": "# Größe", "title": "T", "groups": ["g"], "metadata": {"a": 1.5}, "revision": 3}
    assert (await client.put("/v1/documents/a", json=body)).status_code == 202
    event = world.event
    assert (event.title, event.groups, event.metadata) == ("T", ("g",), {"a": 1.5})
    assert (event.content_type, event.version) == ("text/markdown; charset=utf-8", 3)
    assert await world.content() == "# Größe".encode()


async def test_form_with_a_file(world, client):
    form = {"title": "Größe", "groups": "a,b", "metadata": '{"k": "v"}', "revision": "4"}
    response = await client.put("/v1/documents/r", data=form, files={"file": ("report.pdf", b"%PDF-", PDF)})
    assert response.status_code == 202
    event = world.event
    assert (event.title, event.groups, event.metadata, event.version) == ("Größe", ("a", "b"), {"k": "v"}, 4)
    assert (event.content_type, event.file_name) == (PDF, "report.pdf")
    assert await world.content() == b"%PDF-"


async def sent_through(door: str, client: httpx.AsyncClient, groups: list[str]) -> httpx.Response:
    """An upload for groups, as each door takes it; the response, or the one line of a batch's."""
    text = ",".join(groups)
    match door:
        case "header":
            headers = {"Freshline-Groups": header_value(text)}
            return await client.put("/v1/documents/a.md", content=b"x", headers=headers)
        case "form":
            return await client.put("/v1/documents/a.md", data={"groups": text}, files={"file": ("a.md", b"x")})
        case "json":
            return await client.put("/v1/documents/a.md", json={"text": "x", "groups": groups})
        case _:
            line = orjson.dumps({"document_id": "a.md", "text": "x", "groups": groups})
            return await client.post("/v1/documents:batch", content=line, headers={"Content-Type": NDJSON})


@pytest.mark.parametrize("door", ["header", "form", "json", "batch"])
@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ([], ()),
        (["hr"], ("hr",)),
        ([" hr ", "\tboard"], ("hr", "board")),
        (["hr", "", "  ", "it"], ("hr", "it")),
        (["hr", "HR", "hr", " hr"], ("hr", "HR")),
        (["u\u0308ber", "\u00fcber"], ("\u00fcber",)),
        ([" * "], ("*",)),
        (["all staff"], ("all staff",)),
    ],
    ids=str,
)
async def test_the_same_groups_are_stored_whichever_door_they_come_in_by(world, client, door, given, stored):
    response = await sent_through(door, client, given)
    assert response.status_code in {200, 202}, response.text
    assert world.event.groups == stored


@pytest.mark.parametrize("door", ["header", "form", "json", "batch"])
async def test_groups_that_are_all_blank_do_not_make_a_document_everyones(world, client, door):
    response = await sent_through(door, client, [" ", ""])
    reported = response.json() if door != "batch" else response.json()["outcomes"][0]["problem"]
    assert reported["status"] == 422
    [error] = reported["errors"]
    assert error["field"].lower() in {"groups", "freshline-groups"}
    assert "every group name is blank" in error["message"]
    assert world.records == []


@pytest.mark.parametrize(
    ("path", "headers", "expected"),
    [
        ("a.md", {}, "text/markdown"),
        ("a.PDF", {"Content-Type": "application/octet-stream"}, PDF),
        ("no-suffix", {"Freshline-File-Name": "x.html"}, "text/html"),
        ("a.md", {"Content-Type": "TEXT/PLAIN"}, "text/plain"),
        ("a.md", {"Content-Type": 'TEXT/PLAIN; x=y; CharSet="KOI8-R"'}, "text/plain; charset=koi8-r"),
        ("a.md", {"Content-Type": "text/html;charset=latin1"}, "text/html; charset=windows-1252"),
        ("a.md", {"Content-Type": "text/csv; charset=cp850"}, "text/csv; charset=cp850"),
        ("a.md", {"Content-Type": "text/plain; charset=us-ascii"}, "text/plain"),
        ("a.md", {"Content-Type": "application/octet-stream; charset=sjis"}, "text/markdown; charset=shift_jis"),
        ("a.md", {"Content-Type": f"{PDF}; charset=no-such"}, PDF),
    ],
)
async def test_type_is_as_declared_else_by_name(world, client, path, headers, expected):
    assert (await client.put(f"/v1/documents/{path}", content=b"x", headers=headers)).status_code == 202
    assert world.event.content_type == expected


async def test_a_part_of_a_form_declares_its_charset(world, client):
    part = ("a.txt", "Größe".encode("latin-1"), 'text/plain; charset="ISO-8859-1"')
    assert (await client.put("/v1/documents/a", files={"file": part})).status_code == 202
    assert world.event.content_type == "text/plain; charset=windows-1252"


async def test_content_in_a_batch_declares_its_charset(world, client):
    content = base64.b64encode("Größe".encode("latin-1")).decode()
    line = {"document_id": "a", "content_b64": content, "content_type": "text/plain; charset=latin1"}
    assert (await post_batch(client, ndjson(line))).json()["accepted"] == 1
    assert world.event.content_type == "text/plain; charset=windows-1252"


async def test_text_in_json_is_stored_as_utf8_whatever_it_declares(world, client):
    body = {"text": "Größe", "content_type": "text/html; charset=koi8-r"}
    assert (await client.put("/v1/documents/a", json=body)).status_code == 202
    assert world.event.content_type == "text/html; charset=utf-8"


async def test_an_unknown_charset_is_refused_and_its_field_is_named(world, client):
    declared = 'text/plain; charset="no-such"'
    raw = await client.put("/v1/documents/a", content=b"x", headers={"Content-Type": declared})
    form = await client.put("/v1/documents/a", files={"file": ("a.txt", b"x", declared)})
    text = await client.put("/v1/documents/a", json={"text": "x", "content_type": declared})
    assert [fields_of(one) for one in (raw, form, text)] == [["Content-Type"], ["file"], ["content_type"]]
    lines = ({"document_id": "a", name: "AAAA", "content_type": declared} for name in ("text", "content_b64"))
    outcomes = (await post_batch(client, ndjson(*lines))).json()["outcomes"]
    assert [(one["problem"]["status"], one["problem"]["errors"][0]["field"]) for one in outcomes] == [
        (422, "content_type")
    ] * 2
    assert "no-such" in raw.json()["errors"][0]["message"]
    assert world.records == []


EMPTY = {
    "raw": {"content": b""},
    "no body at all": {},
    "json": {"json": {"text": ""}},
    "form": {"files": {"file": ("a.md", b"")}},
}


@pytest.mark.parametrize("kind", EMPTY)
async def test_empty_document_is_a_document_where_that_is_stated(world, client, kind):
    response = await client.put("/v1/documents/a.md", **EMPTY[kind], params={"empty": "true"})
    assert response.status_code == 202, response.text
    assert await world.content() == b""


@pytest.mark.parametrize("kind", EMPTY)
async def test_empty_upload_is_refused_where_no_caller_states_that_it_is_meant(world, client, kind):
    for params in ({}, {"empty": "false"}):
        problem = problem_of(await client.put("/v1/documents/a.md", **EMPTY[kind], params=params), 422)
        assert [error.field for error in problem.errors] == ["body"]
        assert "?empty=true" in problem.detail
    assert world.records == []


@pytest.mark.parametrize(
    "request_of", [{"content": b"x"}, {"json": {"text": "x"}}, {"files": {"file": ("a.md", b"x")}}]
)
async def test_content_of_a_document_that_is_stated_to_be_empty_is_refused(world, client, request_of):
    problem_of(await client.put("/v1/documents/a.md", **request_of, params={"empty": "true"}), 422)
    assert world.records == []


async def test_empty_line_of_a_batch_states_that_it_is_meant(world, client):
    lines = [
        {"document_id": "a.md", "text": ""},
        {"document_id": "b.md", "content_b64": ""},
        {"document_id": "c.md", "text": "", "empty": True},
        {"document_id": "d.md", "content_b64": "", "empty": True},
        {"document_id": "e.md", "text": "x", "empty": True},
        {"document_id": "f.md", "deleted": True, "empty": True},
        {"document_id": "g.md", "empty": True},
    ]
    for line in lines:  # more than one batch may have
        [outcome] = (await post_batch(client, ndjson(line))).json()["outcomes"]
        accepted = line["document_id"] in {"c.md", "d.md"}
        assert ("accepted" in outcome, "problem" in outcome) == (accepted, not accepted), outcome
    assert len(world.records) == 2


@pytest.mark.parametrize("kind", ["raw", "json", "form", "batch"])
async def test_body_of_another_length_than_declared_is_400(world, client, kind):
    """Whatever is before the application: it may not take a part of a body for the whole."""
    path = "/v1/documents:batch" if kind == "batch" else "/v1/documents/a.md"
    types = {
        "raw": "text/markdown",
        "json": "application/json",
        "form": "multipart/form-data; boundary=b",
        "batch": NDJSON,
    }
    bodies = {
        "raw": b"# Cut",
        "json": b'{"text": "x"}',
        "form": b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.md"\r\n\r\nx\r\n--b--\r\n',
        "batch": b'{"document_id": "a.md", "text": "x"}',
    }
    for body in (bodies[kind], b""):
        for length in (len(bodies[kind]) + 1, len(bodies[kind]) - 1):
            response = await client.request(
                "POST" if kind == "batch" else "PUT",
                path,
                content=body,
                headers={"Content-Type": types[kind], "Content-Length": str(length)},
            )
            assert "Content-Length" in problem_of(response, 400).detail
    assert world.records == []


@pytest.mark.parametrize("kind", ["declared", "streamed", "json", "form"])
async def test_content_beyond_the_limit_is_413(world, client, kind):
    big = b"x" * (MAX_BYTES + 1)

    async def pieces():
        yield big[:600]
        yield big[600:]

    match kind:
        case "declared":
            response = await client.put("/v1/documents/a.md", content=big)
        case "streamed":
            response = await client.put("/v1/documents/a.md", content=pieces())
        case "json":
            response = await client.put("/v1/documents/a", json={"text": big.decode()})
        case _:
            response = await client.put("/v1/documents/a", files={"file": ("a.md", big)})
    problem = problem_of(response, 413)
    assert f"exceeds the limit of {MAX_BYTES:,} bytes" in problem.detail
    assert world.records == []


async def test_content_at_the_limit_is_taken(world, client):
    full = b"x" * MAX_BYTES
    assert (await client.put("/v1/documents/a.md", content=full)).status_code == 202
    assert (await client.put("/v1/documents/b", json={"text": full.decode()})).status_code == 202
    assert (await client.put("/v1/documents/c", files={"file": ("a.md", full)})).status_code == 202
    assert len(world.records) == 3


async def test_form_far_beyond_the_limit_leaves_no_temporary_file(client):
    # An unclosed one would be a ResourceWarning, which is an error here.
    response = await client.put("/v1/documents/a", files={"file": ("a.md", b"x" * 3_000_000)})
    assert problem_of(response, 413).errors[0].field == "body"


@pytest.mark.parametrize(
    "request_of",
    [
        {"content": b"PK", "headers": {"Content-Type": "application/zip"}},
        {"content": b"PK", "headers": {"Freshline-File-Name": "x.zip"}},
        {"json": {"text": "x", "content_type": "image/png"}},
        {"files": {"file": ("x.zip", b"PK", "application/zip")}},
    ],
)
async def test_unsupported_type_names_the_supported(world, client, request_of):
    problem = problem_of(await client.put("/v1/documents/a", **request_of), 415)
    assert problem.type == "/problems/unsupported-type"
    assert "text/markdown" in problem.detail
    assert PDF in problem.detail
    assert world.records == []


@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ({"Freshline-Title": "x" * 501}, "Freshline-Title"),
        ({"Freshline-Revision": "-1"}, "Freshline-Revision"),
        ({"Freshline-Revision": str(2**53)}, "Freshline-Revision"),
        ({"Freshline-Revision": "soon"}, "Freshline-Revision"),
        ({"Freshline-Metadata": "{"}, "Freshline-Metadata"),
        ({"Freshline-Metadata": "[1]"}, "Freshline-Metadata"),
        ({"Freshline-Metadata": '{"a": NaN}'}, "Freshline-Metadata"),
        ({"Freshline-Groups": ",".join(f"g{n}" for n in range(65))}, "Freshline-Groups"),
    ],
)
async def test_wrong_header_is_named_as_the_sender_wrote_it(world, client, headers, field):
    response = await client.put("/v1/documents/a.md", content=b"x", headers=headers)
    assert fields_of(response) == [field]
    assert world.records == []


async def test_limit_is_named(client):
    headers = {"Freshline-Title": "x" * 501}
    problem = problem_of(await client.put("/v1/documents/a.md", content=b"x", headers=headers), 422)
    assert "500" in problem.errors[0].message
    assert "Freshline-Title" in problem.detail


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{", "body"),
        (b"{}", "text"),
        (b'{"text": "x", "titel": "y"}', "titel"),
        (b'{"text": "x", "metadata": {"a": NaN}}', "metadata.a"),
        (b'{"text": "\\ud800"}', "body"),
    ],
)
async def test_wrong_json_is_named(world, client, body, field):
    response = await client.put("/v1/documents/a", content=body, headers={"Content-Type": "application/json"})
    found = fields_of(response)
    assert found
    assert all(name == field or name.startswith(f"{field}.") for name in found)
    assert world.records == []


@pytest.mark.parametrize(
    ("request_of", "field"),
    [
        ({"data": {"title": "x"}, "files": {"other": ("a.md", b"x")}}, "file"),
        ({"data": {"titel": "x"}, "files": {"file": ("a.md", b"x")}}, "titel"),
        ({"data": {"metadata": "no"}, "files": {"file": ("a.md", b"x")}}, "metadata"),
        ({"content": b"no boundary", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, "body"),
        ({"content": b"", "headers": {"Content-Type": "multipart/form-data"}}, "body"),
    ],
)
async def test_wrong_form_is_named(world, client, request_of, field):
    assert fields_of(await client.put("/v1/documents/a", **request_of)) == [field]
    assert world.records == []


@pytest.mark.parametrize("document_id", ["", "x" * 513, "a%00b", "a%7Fb"])
async def test_wrong_document_id_is_named(client, document_id):
    assert fields_of(await client.put(f"/v1/documents/{document_id}", content=b"x")) == ["document_id"]


async def test_delete(world, client):
    response = await client.delete("/v1/documents/a/b.md", headers={"Freshline-Revision": "9"})
    assert response.status_code == 202
    assert (world.event.change, world.event.document_id, world.event.version) == (Change.DELETED, "a/b.md", 9)
    response = await client.delete("/v1/documents/a/b.md", headers={"Freshline-Revision": "x"})
    assert fields_of(response) == ["freshline-revision"]


def ndjson(*lines):
    return b"\n".join(line if isinstance(line, bytes) else orjson.dumps(line) for line in lines)


async def post_batch(client, body, **headers):
    return await client.post("/v1/documents:batch", content=body, headers={"Content-Type": NDJSON} | headers)


async def test_each_line_of_a_batch_has_its_own_outcome(world, client):
    body = ndjson(
        {"document_id": "a.md", "text": "one", "title": "T"},
        b"",
        {"document_id": "b", "content_b64": base64.b64encode(b"%PDF").decode(), "content_type": PDF},
        b"not json",
        {"document_id": "a.md", "deleted": True},
        {"document_id": "c", "text": "x", "deleted": True},
    )
    response = await post_batch(client, body)
    assert response.status_code == 200
    result = response.json()
    assert (result["accepted"], result["rejected"]) == (3, 2)
    outcomes = result["outcomes"]
    assert [outcome["line"] for outcome in outcomes] == [1, 3, 4, 5, 6]
    assert ["accepted" in outcome for outcome in outcomes] == [True, True, False, True, False]
    assert outcomes[3]["accepted"]["version"] > outcomes[0]["accepted"]["version"]
    assert [outcome.get("document_id") for outcome in outcomes] == ["a.md", "b", None, "a.md", "c"]
    assert [error["field"] for error in outcomes[4]["problem"]["errors"]] == ["text", "deleted"]
    events = {
        (event.document_id, event.change, event.content_type)
        for event in (decode(DocumentEvent, record.value, record.headers) for record in world.records)
    }
    assert events == {
        ("a.md", Change.UPSERTED, "text/markdown; charset=utf-8"),
        ("a.md", Change.DELETED, None),
        ("b", Change.UPSERTED, PDF),
    }


@pytest.mark.parametrize(
    ("line", "status", "field"),
    [
        ({"document_id": "a"}, 422, "text"),
        ({"text": "x"}, 422, "document_id"),
        ({"document_id": "a", "text": "x", "extra": 1}, 422, "extra"),
        ({"document_id": "a", "content_b64": "***", "content_type": PDF}, 422, "content_b64"),
        ({"document_id": "a", "text": "x" * (MAX_BYTES + 1)}, 413, "text"),
        ({"document_id": "a", "content_b64": "AAAA"}, 415, None),
    ],
)
async def test_wrong_line_is_named(world, client, line, status, field):
    (outcome,) = (await post_batch(client, ndjson(line))).json()["outcomes"]
    problem = outcome["problem"]
    assert problem["status"] == status
    assert field is None or problem["errors"][0]["field"] == field
    assert world.records == []


async def test_batch_outcomes_as_lines(client):
    body = ndjson({"document_id": "a", "text": "x"}, b"{")
    response = await post_batch(client, body, Accept=NDJSON)
    assert response.headers["content-type"] == NDJSON
    first, second = (orjson.loads(line) for line in response.content.splitlines())
    assert first["accepted"]["document_id"] == "a"
    assert second["problem"]["status"] == 422


async def test_lines_may_be_cut_anywhere(client):
    body = ndjson({"document_id": "a", "text": "größe"}, {"document_id": "b", "text": "y"}) + b"\r\n"

    async def pieces():
        for byte in body:
            yield bytes([byte])

    assert (await post_batch(client, pieces())).json()["accepted"] == 2


@pytest.mark.parametrize(
    "body", [ndjson(*[{"document_id": "a", "text": "x"}] * 6), ndjson(*[{"document_id": "a", "text": "x" * 900}] * 12)]
)
async def test_batch_beyond_a_limit_has_no_effect(world, client, body):
    async def pieces():
        yield body

    for sent in (body, pieces()):
        assert problem_of(await post_batch(client, sent), 413).errors[0].field == "body"
    assert world.records == []


async def test_batch_must_be_declared_as_ndjson(world, client):
    # A web page cannot send this type to another origin unasked, which it can do with text/plain.
    body = ndjson({"document_id": "a", "text": "x"})
    problem_of(await post_batch(client, body, **{"Content-Type": "text/plain"}), 415)
    assert world.records == []


async def test_document_state_arrives_from_the_manifest(world, client):
    key = DocumentKey("local", "a/b.md")
    manifest = Manifest(
        tenant="local",
        document_id="a/b.md",
        version=5,
        complete=True,
        state=LifeState.LIVE,
        position="documents.v1-1:2",
        profile="p",
        title="T",
        chunks=("1", "2"),
        updated_ms=9,
    )
    problem_of(await client.get("/v1/documents/a/b.md"), 404)
    world.index.known[key] = manifest
    state = (await client.get("/v1/documents/a/b.md")).json()
    assert (state["state"], state["version"], state["chunks"], state["updating"]) == ("live", 5, 2, False)
    world.index.known[key] = manifest.model_copy(update={"state": LifeState.DELETED, "complete": False})
    state = (await client.get("/v1/documents/a/b.md")).json()
    assert (state["state"], state["updating"]) == ("deleted", True)


async def test_event_status(world, client):
    event_id = (await client.put("/v1/documents/a.md", content=b"x")).json()["event_id"]
    status = (await client.get(f"/v1/events/{event_id}")).json()
    assert (status["event_id"], status["stage"], status["outcome"]) == (event_id, "accepted", None)
    problem_of(await client.get("/v1/events/other"), 404)
    world.states.available = False
    assert (await client.get(f"/v1/events/{event_id}")).headers["retry-after"] == "1"


async def accepted_unrecorded(world, client):
    """An event whose end Redis does not know, when its position is applied."""
    accepted = (await client.put("/v1/documents/a.md", content=b"x")).json()
    assert (await client.get(f"/v1/events/{accepted['event_id']}")).json()["outcome"] is None, "it may be under way"
    position = Position.parse(accepted["position"])
    await world.answers.apply("local", {position.partition: position.offset}, drop=True)
    return accepted


async def report_end(world, accepted, outcome, reason=None, *, event_id=None, tenant="local", passages=None):
    status = EventStatus(
        event_id=event_id or accepted["event_id"],
        document_id="a.md",
        version=accepted["version"],
        position=accepted["position"],
        stage=Stage.PURGED,
        outcome=outcome,
        reason=reason,
        passages=passages,
        accepted_ms=1_000.0,
        stages_ms={Stage.ACCEPTED: 0.0, Stage.SEARCHABLE: 40.0, Stage.PURGED: 50.0},
    )
    partition = Position.parse(accepted["position"]).partition
    await world.streams.send(encode_ended(EventEnded(tenant=tenant, status=status), partition, None))


async def test_an_end_that_was_not_recorded_is_the_first_that_the_stream_reports(world, client):
    accepted = await accepted_unrecorded(world, client)
    await report_end(world, accepted, Outcome.DEAD_LETTER, "another", event_id="another")
    await report_end(world, accepted, Outcome.DEAD_LETTER, "another tenant's", tenant="umbrella")
    await report_end(world, accepted, Outcome.DONE)
    await report_end(world, accepted, Outcome.SUPERSEDED, "told again")
    status = (await client.get(f"/v1/events/{accepted['event_id']}")).json()
    assert (status["outcome"], status["reason"], status["stage"]) == ("done", None, "purged")
    assert status["stages_ms"]["searchable"] == 40.0
    world.streams.log.clear()
    again = (await client.get(f"/v1/events/{accepted['event_id']}")).json()
    assert (again["outcome"], again["stage"]) == ("done", "purged"), "it is recorded now"


async def test_a_recorded_end_arrives_before_one_of_the_stream(world, client):
    accepted = await accepted_unrecorded(world, client)
    await report_end(world, accepted, Outcome.DONE)
    recorded = Progress("local", accepted["event_id"], Stage.CHUNKED, 9.0, Outcome.SUPERSEDED, "recorded")
    await world.states.advance([recorded])
    status = (await client.get(f"/v1/events/{accepted['event_id']}")).json()
    assert (status["outcome"], status["reason"]) == ("superseded", "recorded")


async def test_an_end_that_nothing_reports_stays_open(world, client):
    accepted = await accepted_unrecorded(world, client)
    assert (await client.get(f"/v1/events/{accepted['event_id']}")).json()["outcome"] is None
    await report_end(world, accepted, Outcome.DONE)
    world.read_fails = True
    assert (await client.get(f"/v1/events/{accepted['event_id']}")).json()["outcome"] is None
    world.read_fails = False
    assert (await client.get(f"/v1/events/{accepted['event_id']}")).json()["outcome"] == "done"


async def test_problem_of_an_event_lost_in_redis_refers_to_the_stream(client):
    assert "which reads the stream" in problem_of(await client.get("/v1/events/lost"), 404).detail


async def read_many(client, *events):
    asked = [{"event_id": one["event_id"], "position": one["position"]} for one in events]
    response = await client.post("/v1/events:batch-get", json={"events": asked})
    assert response.status_code == 200, response.text
    return response.json()


async def test_many_events_are_reported_in_the_order_in_which_they_are_asked_for(world, client):
    accepted = [(await client.put(f"/v1/documents/{n}.md", content=b"x")).json() for n in range(3)]
    other = accepted[0] | {"event_id": "other"}
    reported = await read_many(client, accepted[2], other, accepted[0], accepted[2])
    assert [one["document_id"] for one in reported["events"]] == ["2.md", "0.md"]
    assert [one["outcome"] for one in reported["events"]] == [None, None]
    assert reported["unknown"] == ["other"]
    world.states.available = False
    failing = await client.post("/v1/events:batch-get", json={"events": [{"event_id": "a"}]})
    assert problem_of(failing, 503)
    assert failing.headers["retry-after"] == "1"


async def test_the_end_of_an_event_of_which_redis_has_lost_everything_is_found_by_its_position(world, client):
    accepted = [(await client.put("/v1/documents/a.md", content=b"x")).json() for _ in range(3)]
    world.states._fields.clear()
    assert (await read_many(client, *accepted))["unknown"] == [one["event_id"] for one in accepted]
    await report_end(world, accepted[0], Outcome.DONE, passages=4)
    await report_end(world, accepted[1], Outcome.DEAD_LETTER, "another tenant's", tenant="umbrella")
    await report_end(world, accepted[2], Outcome.DEAD_LETTER, "torn")
    reported = await read_many(client, *accepted)
    assert [(one["outcome"], one["reason"], one["passages"]) for one in reported["events"]] == [
        ("done", None, 4),
        ("dead_letter", "torn", None),
    ]
    assert reported["unknown"] == [accepted[1]["event_id"]]
    world.streams.log.clear()
    assert (await read_many(client, *accepted)) == reported, "it is recorded again"
    assert (await client.get(f"/v1/events/{accepted[0]['event_id']}")).json() == reported["events"][0]


async def test_a_tenant_reads_the_stream_of_ends_once_at_a_time(world, client):
    accepted = (await client.put("/v1/documents/a.md", content=b"x")).json()
    world.states._fields.clear()
    await report_end(world, accepted, Outcome.DONE)
    world.reading, world.may_read = asyncio.Event(), asyncio.Event()
    first = asyncio.create_task(read_many(client, accepted))
    await asyncio.wait_for(world.reading.wait(), 5)
    assert (await read_many(client, accepted))["unknown"] == [accepted["event_id"]]
    world.may_read.set()
    assert [one["outcome"] for one in (await first)["events"]] == ["done"]


@pytest.mark.parametrize(
    ("events", "field"),
    [
        ([], "events"),
        ([{"event_id": str(n)} for n in range(MAX_EVENTS_PER_REQUEST + 1)], "events"),
        ([{"event_id": ""}], "events.0.event_id"),
        ([{"event_id": "x" * 65}], "events.0.event_id"),
        ([{"event_id": "a", "position": "documents.v1-x"}], "events.0.position"),
        ([{"event_id": "a", "tenant": "umbrella"}], "events.0.tenant"),
    ],
)
async def test_events_asked_for_in_a_wrong_way(client, events, field):
    assert fields_of(await client.post("/v1/events:batch-get", json={"events": events}))[0] == field


async def test_events_are_asked_for_as_json_of_bounded_size(client):
    problem_of(await client.post("/v1/events:batch-get", content=b'{"events": []}'), 415)
    large = {"events": [{"event_id": "a" * 300_000}]}
    problem_of(await client.post("/v1/events:batch-get", json=large), 413)


def events_of(text: str) -> list[tuple[str, dict]]:
    """Name and data of each event of a stream."""
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.strip().split("\n\n")]
    return [(block["event"], orjson.loads(block["data"])) for block in blocks]


async def test_event_is_followed_until_it_has_ended(world, client):
    event_id = (await client.put("/v1/documents/a.md", content=b"x")).json()["event_id"]

    async def go_on():
        for stage in (Stage.CHUNKED, Stage.PURGED):
            await asyncio.sleep(2 * POLL_S)
            outcome = Outcome.DONE if stage is Stage.PURGED else None
            await world.states.advance([Progress("local", event_id, stage, 2e12, outcome)])

    going = asyncio.create_task(go_on())
    response = await client.get(f"/v1/events/{event_id}", headers={"accept": "text/event-stream"})
    await going
    assert response.headers["content-type"].startswith("text/event-stream")
    reported = events_of(response.text)
    assert [(name, status["stage"]) for name, status in reported] == [
        ("stage", "accepted"),
        ("stage", "chunked"),
        ("ended", "purged"),
    ]
    assert reported[-1][1] == (await client.get(f"/v1/events/{event_id}")).json()
    problem_of(await client.get("/v1/events/other", headers={"accept": "text/event-stream"}), 404)


async def test_event_is_followed_for_a_while_and_no_longer_than_redis_answers(world, client):
    event_id = (await client.put("/v1/documents/a.md", content=b"x")).json()["event_id"]
    status = await world.states.get("local", event_id)
    assert [one async for one in follow(world.states, "local", status, max_s=0)] == [status]
    world.states.available = False
    assert [one async for one in follow(world.states, "local", status)] == [status]


async def test_deletion_has_a_receipt_once_it_is_done(world, client):
    accepted = (await client.delete("/v1/documents/a.md")).json()
    receipt = f"/v1/events/{accepted['event_id']}/receipt"
    problem_of(await client.get(receipt), 404)
    key = DocumentKey("local", "a.md")
    purged_ms = world.event.accepted_ms + 5
    await world.states.advance([Progress("local", accepted["event_id"], Stage.PURGED, purged_ms, Outcome.DONE)])
    problem_of(await client.get(receipt), 404)
    tombstone = Manifest(
        tenant="local",
        document_id="a.md",
        version=accepted["version"],
        complete=True,
        state=LifeState.DELETED,
        position=accepted["position"],
        profile="p",
        updated_ms=0,
    )
    world.index.known[key] = tombstone
    reported = (await client.get(receipt)).json()
    assert (reported["document_id"], reported["position"], reported["passages"]) == ("a.md", accepted["position"], 0)
    assert reported["accepted_ms"] < reported["purged_ms"] == pytest.approx(purged_ms)
    world.index.found[key] = 2
    assert "2 deleted passages" in problem_of(await client.get(receipt), 503).detail
    world.index.known[key] = tombstone.model_copy(update={"version": tombstone.version + 1})
    problem_of(await client.get(receipt), 404)


async def test_ready_needs_what_acceptance_needs(world, client):
    assert (await client.get("/ready")).json() == {"kafka": "ok", "blobs": "ok", "redis": "ok"}
    world.failing = {"redis"}
    response = await client.get("/ready")
    assert (response.status_code, response.json()["redis"]) == (200, "unavailable")
    world.failing = {"blobs", "kafka"}
    problem = problem_of(await client.get("/ready"), 503)
    assert problem.detail == "not ready: kafka, blobs"
    assert (await client.get("/health")).json() == {"status": "ok"}


async def test_openapi_describes_bodies_headers_and_problems(client):
    put = (await client.get("/openapi.json")).json()["paths"]["/v1/documents/{document_id}"]["put"]
    assert {"application/json", "multipart/form-data", "text/markdown", PDF} <= set(put["requestBody"]["content"])
    assert {"Freshline-Title", "Freshline-File-Name"} <= {parameter["name"] for parameter in put["parameters"]}
    assert set(put["responses"]) >= {"202", "401", "413", "415", "422", "503"}
    assert PROBLEM_MEDIA_TYPE in put["responses"]["413"]["content"]


TENANT = "local"


async def dead_letter(world: World, version: int = 3, offset: int = 7, tenant: str = TENANT) -> DocumentEvent:
    event = DocumentEvent(
        event_id=f"e{version}",
        tenant=tenant,
        document_id="a.md",
        version=version,
        change=Change.DELETED,
        accepted_ms=0,
    )
    record = Record(DEAD_LETTERS.name, b"k", encode_event(event).value, encode_event(event).headers, 0)
    reported = {"topic": DOCUMENTS, "offset": offset, "step": "prepare", "kind": "failed", "reason": "why"}
    await world.streams.send(encode_dead_letter(record, **reported))
    return event


async def test_dead_letters_are_listed_counted_and_shown(world, client):
    assert (await client.get("/v1/dead-letters")).json() == {
        "total": 0,
        "by_kind": {},
        "by_step": {},
        "dead_letters": [],
    }
    for offset in range(3):
        await dead_letter(world, offset=offset)
    listed = (await client.get("/v1/dead-letters", params={"limit": 2})).json()
    assert (listed["total"], listed["by_kind"], listed["by_step"]) == (3, {"failed": 3}, {"prepare": 3})
    assert [one["dead_letter_id"] for one in listed["dead_letters"]] == ["documents.v1-0:0", "documents.v1-0:1"]
    assert (await client.get("/v1/dead-letters", params={"kind": "password"})).json()["total"] == 0
    shown = (await client.get("/v1/dead-letters/documents.v1-0:1")).json()
    assert shown["dead_letter"]["document_id"] == "a.md"
    assert shown["headers"]["__connect.errors.exception.message"] == "why"
    assert orjson.loads(shown["value"])["event_id"] == "e3"


async def test_dead_letter_that_is_replayed_is_a_new_event_of_its_version(world, client):
    event = await dead_letter(world)
    replayed = await client.post("/v1/dead-letters/documents.v1-0:7/replay")
    assert replayed.status_code == 202
    [again] = [
        decode(DocumentEvent, record.value, record.headers)
        for record in world.records
        if record.topic == DOCUMENTS.name
    ]
    assert again.event_id == replayed.json()["event_id"] != event.event_id
    assert (again.version, again.change, again.rewrite) == (event.version, event.change, True)
    status = (await client.get(f"/v1/events/{again.event_id}")).json()
    assert status["position"] == replayed.json()["position"]
    problem_of(await client.post("/v1/dead-letters/documents.v1-0:7/replay"), 404)


async def test_dead_letter_that_is_dropped_is_closed_and_nothing_else(world, client):
    await dead_letter(world)
    assert (await client.delete("/v1/dead-letters/documents.v1-0:7")).status_code == 204
    problem_of(await client.get("/v1/dead-letters/documents.v1-0:7"), 404)
    assert {record.topic for record in world.records} == {DEAD_LETTERS.name}


async def test_dead_letters_of_others_are_not_there(world, client):
    await dead_letter(world, tenant="acme")
    assert (await client.get("/v1/dead-letters")).json()["total"] == 0
    for call in (
        client.get("/v1/dead-letters/documents.v1-0:7"),
        client.post("/v1/dead-letters/documents.v1-0:7/replay"),
        client.delete("/v1/dead-letters/documents.v1-0:7"),
    ):
        problem_of(await call, 404)
    problem_of(await client.get("/v1/dead-letters/nothing"), 422)


# Sources


def owned(document_id, connector, version=5, **fields):
    return Manifest(
        tenant="local",
        document_id=document_id,
        version=version,
        complete=True,
        state=LifeState.LIVE,
        position="documents.v1-0:1",
        profile="p",
        updated_ms=1,
        connector=connector,
        **fields,
    )


def know(world, *manifests):
    world.index.known = {manifest.key: manifest for manifest in manifests}


@pytest.mark.parametrize("method", ["PUT", "DELETE", "batch"])
async def test_document_of_another_connector_is_refused_with_the_ways_out(world, client, method):
    know(world, owned("a.md", "ours"))
    if method == "batch":
        lines = b'{"document_id": "a.md", "text": "x", "connector": "theirs"}\n{"document_id": "b.md", "text": "x"}\n'
        reported = (await client.post("/v1/documents:batch", content=lines, headers={"Content-Type": NDJSON})).json()
        assert (reported["accepted"], reported["rejected"]) == (1, 1)
        problem = Problem.model_validate(reported["outcomes"][0]["problem"])
    else:
        headers = {"Freshline-Connector": "theirs"}
        response = await client.request(method, "/v1/documents/a.md", content=b"x", headers=headers)
        problem = problem_of(response, 409)
        assert world.records == []
    assert problem.type == "/problems/conflict"
    for way in ("'a.md'", "'ours'", "'theirs'", "--name ours", "--prefix", "--take-over"):
        assert way in problem.detail


@pytest.mark.parametrize(
    "given",
    [{}, {"Freshline-Connector": "ours"}, {"Freshline-Connector": "theirs", "Freshline-Take-Over": "true"}],
)
@pytest.mark.parametrize("method", ["PUT", "DELETE"])
async def test_owner_person_and_who_means_it_are_let_in(world, client, method, given):
    know(world, owned("a.md", "ours"))
    response = await client.request(method, "/v1/documents/a.md", content=b"x", headers=given)
    assert response.status_code == 202
    assert world.event.connector == given.get("Freshline-Connector")
    assert world.event.take_over is ("Freshline-Take-Over" in given)


async def test_connector_travels_with_json_form_and_batch(world, client):
    reported = {"connector": "ours", "take_over": True}
    await client.put("/v1/documents/a.md", json={"text": "x", **reported})
    form = {"connector": "ours", "take_over": "true"}
    await client.put("/v1/documents/b.md", data=form, files={"file": ("b.md", b"x")})
    lines = orjson.dumps({"document_id": "c.md", "deleted": True, **reported})
    await client.post("/v1/documents:batch", content=lines, headers={"Content-Type": NDJSON})
    events = [decode(DocumentEvent, record.value, record.headers) for record in world.records]
    assert [(event.connector, event.take_over) for event in events] == [("ours", True)] * 3


@pytest.mark.parametrize("name", ["a b", "-a", "x" * 101, "ä"])
async def test_name_that_no_connector_can_have_is_refused(world, client, name):
    body = {"text": "x", "connector": name}
    assert fields_of(await client.put("/v1/documents/a.md", json=body)) == ["connector"]
    assert world.records == []


@pytest.mark.parametrize(
    ("owner", "revision", "status"), [("other", 5, 409), ("other", 6, 202), ("mine", 5, 202), (None, 5, 202)]
)
async def test_revision_below_that_of_another_source_is_a_conflict(world, client, owner, revision, status):
    know(world, owned("a.md", owner))
    headers = {"Freshline-Connector": "mine", "Freshline-Revision": str(revision), "Freshline-Take-Over": "true"}
    response = await client.put("/v1/documents/a.md", content=b"x", headers=headers)
    assert response.status_code == status
    if status == 409:
        assert f"revision {revision} would never become searchable" in response.json()["detail"]


async def test_documents_are_listed_in_pages_and_say_whether_any_may_be_missing(world, client):
    know(world, *(owned(f"{name}.md", "ours") for name in "abc"))
    page = (await client.get("/v1/documents?connector=ours&limit=2")).json()
    assert [one["document_id"] for one in page["documents"]] == ["a.md", "b.md"]
    assert (page["next_after"], page["complete"]) == ("b.md", True)
    assert world.index.listed == ("local", "ours", None, 2)
    page = (await client.get("/v1/documents?connector=ours&limit=2&after=b.md")).json()
    assert ([one["document_id"] for one in page["documents"]], page["next_after"], page["complete"]) == (
        ["c.md"],
        None,
        None,
    )
    world.streams.indexed = False
    assert (await client.get("/v1/documents")).json()["complete"] is False
    assert fields_of(await client.get("/v1/documents?limit=0")) == ["limit"]


async def test_owner_is_shown_and_titles_are_not_listed(world, client):
    know(world, owned("a.md", "ours", title="secret plan", groups=("board",)))
    assert (await client.get("/v1/documents/a.md")).json()["connector"] == "ours"
    assert "secret" not in (await client.get("/v1/documents")).text


async def test_installation_is_reported_with_the_tenant(world, client):
    reported = (await client.get("/v1/installation")).json()
    assert reported == {"installation_id": world.streams.id, "tenant": "local"}
