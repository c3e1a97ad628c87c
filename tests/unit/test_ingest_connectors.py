"""Connectors against a service that keeps what it is sent: what they send, in which order, and how they go on."""

import asyncio
import gzip
import itertools
import os
import re
import socket
import subprocess
from base64 import b64decode
from collections import defaultdict
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import orjson
import pytest
import stamina

from ingest.connectors.client import (
    IngestClient,
    Rejected,
    ServiceUnavailable,
    Summary,
    no_progress,
)
from ingest.connectors.encoding import batch_line, header_value, upload_headers
from ingest.connectors.event_file import BadEventFile, ingest_event_file
from ingest.connectors.files import list_folder
from ingest.connectors.folder import ingest_folder
from ingest.connectors.git import GitFailed, ingest_git
from ingest.connectors.guard import TooManyDeletions, check_deletions
from ingest.connectors.outcomes import EventOutcomes, wait_for_outcomes
from ingest.connectors.rounds import ALONE_BYTES, ROUND_BYTES, ROUND_EVENTS, Outgoing
from ingest.connectors.sent_log import UNCONFIRMED, LogIdentity, SentLog, SourceInUse, default_log_path
from ingest.connectors.source import BadSourceName, SourceOptions, default_name
from ingest.core.attributes import as_attributes, from_headers, header_text
from ingest.core.changes import Removal, Upload
from schemas.documents import DocumentAttributes

WAIT_S = 10
IDENTITY = LogIdentity(kind="folder", installation="one", tenant="t", source="s")


class Service:
    """The ingest API as connectors see it: keeps contents, and can be busy, dumb or slow for a while."""

    def __init__(self):
        self.contents: dict[str, bytes] = {}
        self.given: dict[str, dict[str, Any]] = {}
        self.log: list[tuple[str, str, bytes]] = []
        self.offsets: defaultdict[int, int] = defaultdict(int)
        self.owners: dict[str, str | None] = {}
        self.versions: dict[str, int] = {}
        self.installation = "one"
        self.complete = True
        self.page = 3
        self.outcomes: dict[str, str] = {}
        self.asked: list[list[dict[str, str]]] = []
        self.answers: list[httpx.Response | Exception] = []
        self.refuse: set[str] = set()
        self.conflicts: set[str] = set()
        self.busy: dict[str, int] = {}
        self.most_lines = 1_000
        self.in_progress = self.most_in_progress = 0
        self.changed = asyncio.Condition()

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.in_progress += 1
        self.most_in_progress = max(self.most_in_progress, self.in_progress)
        await asyncio.sleep(0)
        self.in_progress -= 1
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        path = request.url.raw_path.decode()
        if path == "/v1/events:batch-get":
            self.asked.append(orjson.loads(request.content)["events"])
            return self._statuses([one["event_id"] for one in self.asked[-1]])
        if request.method == "GET":
            return self._get(request.url)
        if path == "/v1/documents:batch":
            return await self._batch([orjson.loads(line) for line in request.content.splitlines()])
        path, _, parameters = path.partition("?")
        document_id = unquote(path.removeprefix("/v1/documents/"))
        mistaken = request.method == "PUT" and (parameters == "empty=true") is bool(request.content)
        if mistaken or document_id in self.refuse | self.conflicts:
            return problem(422 if mistaken else self._refused_as(document_id), "less")
        async with self.changed:
            accepted = self._take(request.method, document_id, request.content, as_given(request.headers))
            self.changed.notify_all()
        return httpx.Response(202, json=accepted)

    def _get(self, url):
        if url.path == "/v1/installation":
            return httpx.Response(200, json={"installation_id": self.installation, "tenant": "t"})
        if url.path == "/v1/documents":
            return self._list(**url.params)
        return httpx.Response(404, json={})

    async def _batch(self, lines):
        if len(lines) > self.most_lines:
            return problem(413, "fewer lines")
        async with self.changed:
            outcomes = [self._line(number, line) for number, line in enumerate(lines, start=1)]
            self.changed.notify_all()
        return httpx.Response(200, json={"accepted": 0, "rejected": 0, "outcomes": outcomes})

    def _line(self, number, line):
        document_id = line.pop("document_id")
        outcome = {"line": number, "document_id": document_id}
        if document_id in self.refuse | self.conflicts:
            return outcome | {"problem": problem(self._refused_as(document_id), "less").json()}
        if self.busy.get(document_id):
            self.busy[document_id] -= 1
            return outcome | {"problem": problem(503, "later").json()}
        method = "DELETE" if line.pop("deleted", False) else "PUT"
        text, coded = line.pop("text", None), line.pop("content_b64", "")
        content = b64decode(coded) if text is None else text.encode()
        if method == "PUT" and line.pop("empty", False) is bool(content):
            return outcome | {"problem": problem(422, "empty").json()}
        given = {name: value for name, value in line.items() if value is not None}
        return outcome | {"accepted": self._take(method, document_id, content, given)}

    def _refused_as(self, document_id):
        return 409 if document_id in self.conflicts else 413

    def _take(self, method, document_id, content, given):
        self.log.append((method, document_id, content))
        self.given[document_id] = given
        if method == "PUT":
            self.contents[document_id] = content
            self.owners[document_id] = given.get("connector")
            self.versions[document_id] = given.get("revision", 1)
        else:
            self.contents.pop(document_id, None)
        partition = sum(document_id.encode()) % 3
        offset = self.offsets[partition]
        self.offsets[partition] += 1
        return {
            "event_id": f"event-{partition}-{offset}",
            "document_id": document_id,
            "version": given.get("revision", 1),
            "position": f"documents.v1-{partition}:{offset}",
        }

    def _statuses(self, event_ids):
        status = {"document_id": "d", "version": 1, "position": None, "stage": "purged", "accepted_ms": 0}
        known = [name for name in event_ids if name in self.outcomes]
        events = [status | {"event_id": name, "outcome": self.outcomes[name], "stages_ms": {}} for name in known]
        return httpx.Response(200, json={"events": events, "unknown": [n for n in event_ids if n not in known]})

    def _list(self, connector, after="", wait_s=None):
        mine = sorted(name for name in self.contents if self.owners[name] == connector and name > after)[: self.page]
        documents = [
            {
                "document_id": name,
                "version": self.versions[name],
                "content_sha256": sha256(self.contents[name]).hexdigest(),
            }
            for name in mine
        ]
        more = mine[-1] if len(mine) == self.page else None
        complete = None if wait_s is None else self.complete
        return httpx.Response(200, json={"documents": documents, "next_after": more, "complete": complete})

    async def until(self, condition):
        async with asyncio.timeout(WAIT_S), self.changed:
            await self.changed.wait_for(condition)

    @property
    def sent(self):
        return [(method, document_id) for method, document_id, _ in self.log]


def problem(status, detail):
    reported = {"type": "/problems/some", "title": "Too large" if status == 413 else "Busy", "status": status}
    return httpx.Response(status, json=reported | {"detail": f"body: {detail}"})


def as_given(headers):
    """The headers' attributes as a batch has them."""
    texts = from_headers({name.lower(): value for name, value in headers.items()})
    attributes = as_attributes(texts, orjson.loads(texts.get("metadata", "null")))
    given = {"content_type": headers["content-type"]} if "content-type" in headers else {}
    if "revision" in attributes:
        attributes["revision"] = int(attributes["revision"])
    return attributes | given | ({"file_name": texts["file_name"]} if "file_name" in texts else {})


@pytest.fixture
def service():
    return Service()


@pytest.fixture
async def client(service):
    transport = httpx.MockTransport(service)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8081") as http:
        yield IngestClient(http, retry_timeout_s=WAIT_S)


@pytest.fixture
def log_path(tmp_path):
    return tmp_path / "state" / "sent.jsonl"


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "docs"
    root.mkdir()
    return root


def write(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_md", ".md")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def write_latin_1(root):
    """A file whose name is not UTF-8."""
    (root / os.fsdecode(b"caf\xe9.md")).write_text("coffee")


# The client


def upload(document_id="a", content=b"x", **attributes):
    return Upload(document_id, content, "text/markdown", DocumentAttributes(**attributes))


GIVEN = {
    "title": "Größe",
    "source": "x y",
    "groups": ["g", "h"],
    "metadata": {"k": "ü"},
    "revision": 4,
    "content_type": "text/markdown",
    "file_name": "b.md",
}


def upload_with_everything():
    attributes = DocumentAttributes(title="Größe", source="x y", groups=("g", "h"), metadata={"k": "ü"}, revision=4)
    return Upload("a/b c?#%.md", b"text", "text/markdown", attributes, "b.md")


async def test_what_a_source_has_without_content_is_sent_as_empty_on_purpose(service, client, folder, log_path):
    (folder / "was.md").write_text("text", encoding="utf-8")
    await ingest_folder(client, folder, log_path=log_path)
    (folder / "was.md").write_bytes(b"")
    (folder / "new.pdf").write_bytes(b"")
    summary = await ingest_folder(client, folder, log_path=log_path)
    assert (summary.sent, summary.failed) == (2, [])
    assert (service.contents["was.md"], service.contents["new.pdf"]) == (b"", b"")
    await client.send(Upload("alone.md", b"", "text/markdown", DocumentAttributes()))
    assert service.contents["alone.md"] == b""


async def test_upload_carries_attributes(service, client):
    accepted = await client.send(upload_with_everything())
    assert accepted.version == 4
    assert service.contents == {"a/b c?#%.md": b"text"}
    assert service.given["a/b c?#%.md"] == GIVEN


async def test_batch_carries_attributes(service, client, log_path):
    async def outgoing():
        yield Outgoing(upload_with_everything(), "1")
        yield Outgoing(Upload("b.pdf", b"%PDF\xff", "application/pdf", DocumentAttributes(revision=5)), "1")

    with SentLog(log_path, IDENTITY) as log:
        await client.send_all(outgoing(), log, Summary(), no_progress)
    assert service.given["a/b c?#%.md"] == GIVEN
    assert service.given["b.pdf"] == {"content_type": "application/pdf", "revision": 5}
    assert service.contents == {"a/b c?#%.md": b"text", "b.pdf": b"%PDF\xff"}


@pytest.mark.parametrize(
    ("content_type", "carried"),
    [
        ("text/markdown", "text"),
        ("text/html", "content_b64"),
        ("application/xml", "content_b64"),
        ("text/plain; charset=iso-2022-jp", "content_b64"),
    ],
)
def test_a_batch_carries_bytes_where_text_would_change_their_encoding(content_type, carried):
    line = orjson.loads(batch_line(Upload("a", b"plain", content_type, DocumentAttributes())))
    assert {"text", "content_b64"} & set(line) == {carried}


@pytest.mark.parametrize("text", ["plain", "Größe", " padded ", "UTF-8''%41", "100% sure", "a\nb", "", "日本"])
def test_header_values_read_back(text):
    value = header_value(text)
    assert value.isascii()
    assert value.isprintable()
    assert header_text(value) == text
    assert header_text(upload_headers(upload(title=text))["Freshline-Title"]) == text


@pytest.mark.parametrize(
    "answers",
    [
        [httpx.Response(503, headers={"Retry-After": "0"}), httpx.Response(429)],
        [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.Response(502)],
    ],
)
async def test_busy_service_is_tried_again(service, client, answers):
    service.answers = answers
    with stamina.set_testing(True, attempts=5):
        await client.send(upload())
    assert service.contents == {"a": b"x"}


async def test_retry_after_is_obeyed(service, client):
    service.answers = [httpx.Response(503, headers={"Retry-After": "1"})]
    began = asyncio.get_running_loop().time()
    await client.send(upload())
    assert asyncio.get_running_loop().time() - began >= 1


@pytest.mark.parametrize(
    ("answer", "reported"), [(httpx.ConnectError("no"), "is the service running"), (httpx.Response(503), "HTTP 503")]
)
async def test_service_that_stays_away_ends_it(service, client, answer, reported):
    service.answers = [answer] * 10
    with stamina.set_testing(True, attempts=3), pytest.raises(ServiceUnavailable, match=reported):
        await client.send(upload())


async def test_refusal_is_not_tried_again(service, client):
    service.refuse = {"a"}
    with pytest.raises(Rejected, match="Too large: body: less"):
        await client.send(upload())
    assert service.most_in_progress == 1


async def send_all(client, log_path, *events):
    async def outgoing():
        for request in events:
            yield Outgoing(request, None if isinstance(request, Removal) else "1")

    summary, reported = Summary(), []
    with SentLog(log_path, IDENTITY) as log:
        await client.send_all(outgoing(), log, summary, lambda so_far: reported.append(so_far.sent + so_far.deleted))
    return summary, reported


async def test_events_share_requests_and_keep_their_order(service, client, log_path):
    events = [
        Removal(f"doc-{number % 20}", number)
        if number % 50 == 49
        else upload(f"doc-{number % 20}", b"x", revision=number)
        for number in range(3 * ROUND_EVENTS)
    ]
    summary, reported = await send_all(client, log_path, *events)
    assert [service.given[f"doc-{document}"]["revision"] for document in range(20)] == list(range(580, 600))
    assert (summary.sent, summary.deleted, summary.failed) == (588, 12, [])
    assert reported == [ROUND_EVENTS, 2 * ROUND_EVENTS, 3 * ROUND_EVENTS]
    assert summary.positions == {partition: offset - 1 for partition, offset in service.offsets.items()}
    assert [event.document_id for event in summary.events] == [request.document_id for request in events]
    assert [event.event_id for event in summary.events] == [
        f"event-{event.position.partition}-{event.position.offset}" for event in summary.events
    ]
    assert [event.deleted for event in summary.events] == [isinstance(request, Removal) for request in events]


async def test_without_revisions_a_document_has_one_event_in_a_round(service, client, log_path):
    service.busy = {"a": 1}
    with stamina.set_testing(True, attempts=3):
        _, reported = await send_all(client, log_path, upload("a", b"1"), upload("b", b"1"), upload("a", b"2"))
    assert [(document_id, content) for _, document_id, content in service.log] == [
        ("b", b"1"),
        ("a", b"1"),
        ("a", b"2"),
    ]
    assert reported == [2, 3]


async def test_only_what_was_not_taken_is_sent_again(service, client, log_path):
    service.busy = {"b": 2}
    service.refuse = {"c"}
    with stamina.set_testing(True, attempts=3):
        summary, _ = await send_all(client, log_path, *(upload(name) for name in "abcd"))
    assert service.sent == [("PUT", "a"), ("PUT", "d"), ("PUT", "b")]
    assert [(failure.document_id, failure.reason) for failure in summary.failed] == [("c", "Too large: body: less")]


async def test_line_that_stays_busy_ends_it(service, client, log_path):
    service.busy = {"b": 9}
    with stamina.set_testing(True, attempts=3), pytest.raises(ServiceUnavailable, match="Busy: body: later"):
        await send_all(client, log_path, upload("a"), upload("b"))
    with SentLog(log_path, IDENTITY) as log:
        # A service that is busy may have taken it all the same.
        assert log.marks == {"a": "1", "b": UNCONFIRMED}


async def test_service_set_to_smaller_batches_gets_them(service, client, log_path):
    service.most_lines = 3
    summary, _ = await send_all(client, log_path, *(upload(str(number)) for number in range(10)))
    assert (summary.sent, summary.failed) == (10, [])
    service.most_lines = 0
    assert (await send_all(client, log_path, upload("alone")))[0].sent == 1


async def test_unauthorised_batch_is_a_refusal_of_each(service, client, log_path):
    service.answers = [problem(401, "who?")]
    summary, _ = await send_all(client, log_path, upload("a"), upload("b"))
    assert [failure.document_id for failure in summary.failed] == ["a", "b"]


async def test_large_contents_travel_alone_and_side_by_side(service, client, log_path):
    large = b"x" * ALONE_BYTES
    summary, reported = await send_all(
        client, log_path, upload("a", large), upload("b"), upload("c", large), upload("d", b"x" * ROUND_BYTES)
    )
    assert summary.sent == 4
    assert service.most_in_progress == 3
    assert reported == [3, 4]


async def test_outcomes_are_asked_of_the_service_by_id_and_position(service, client, log_path):
    summary, _ = await send_all(client, log_path, upload("a"), Removal("b"))
    outcomes = EventOutcomes()
    outcomes.expect(summary.events)
    first, second = (event.event_id for event in summary.events)
    service.outcomes = {first: "done"}
    waiting = asyncio.create_task(wait_for_outcomes(client, outcomes, timeout_s=WAIT_S))
    done, _ = await asyncio.wait({waiting}, timeout=0.3)
    assert not done
    service.outcomes[second] = "superseded"
    await waiting
    assert [(one.event.document_id, one.outcome) for one in outcomes.ended] == [("a", "done"), ("b", "superseded")]
    assert service.asked[0] == [
        {"event_id": event.event_id, "position": str(event.position)} for event in summary.events
    ]


async def test_a_service_that_does_not_know_the_request_ends_the_wait(service, client, log_path):
    summary, _ = await send_all(client, log_path, upload("a"))
    outcomes = EventOutcomes()
    outcomes.expect(summary.events)
    service.answers = [httpx.Response(404, json={})]
    await wait_for_outcomes(client, outcomes, timeout_s=WAIT_S)
    assert (outcomes.ended, outcomes.in_progress, outcomes.problem) == ([], summary.events, "HTTP 404")


async def test_what_is_ignored_files_is_named_with_the_reason(client, folder, log_path):
    (folder / "photo.PNG").write_bytes(b"x")
    (folder / "LICENSE").write_bytes(b"x")
    (folder / ".hidden.png").write_bytes(b"x")
    (folder / os.fsdecode(b"caf\xe9.md")).write_bytes(b"x")
    (folder / "out.md").symlink_to(log_path)
    log_path.parent.mkdir()
    summary = await ingest_folder(client, folder, log_path=log_path)
    assert {name: reason for name, reason in summary.ignored_files.items() if name != "c.exe"} == {
        "photo.PNG": "files named .PNG are not supported",
        "LICENSE": "files without a suffix are not supported",
        "caf\\xe9.md": "its name is not UTF-8: rename it",
        "out.md": "it is a link to a target outside the folder",
    }


# Bulkhead and log


@pytest.mark.parametrize(
    ("missing", "known", "passes"),
    [(0, 0, True), (10, 10, True), (11, 110, True), (11, 109, False), (100, 1_001, True), (5, 5, True)],
)
def test_guard(missing, known, passes):
    check_deletions(missing, known, confirmed=True)
    if passes:
        check_deletions(missing, known, confirmed=False)
    else:
        with pytest.raises(TooManyDeletions, match=f"{missing} of {known}"):
            check_deletions(missing, known, confirmed=False)


def test_log_survives_a_torn_end_and_forgets_what_is_obsolete(log_path):
    with SentLog(log_path, IDENTITY) as log:
        log.note("a", "1")
        log.note("b\n", "1")
        log.note("a", "2")
        log.note("c", "1")
        log.note("c", None)
    with log_path.open("a") as file:
        file.write('["d", "')
    with SentLog(log_path, IDENTITY) as log:
        assert log.marks == {"a": "2", "b\n": "1"}
        log.note("e", "1")
    assert len(log_path.read_text().splitlines()) == 4
    with SentLog(log_path, IDENTITY) as log:
        assert log.marks == {"a": "2", "b\n": "1", "e": "1"}


def test_each_source_tenant_and_installation_has_a_log_of_its_own():
    identities = [
        LogIdentity(kind="folder", installation=installation, tenant=tenant, source=source)
        for installation in "ab"
        for tenant in "tu"
        for source in ("x", "y")
    ]
    assert len({default_log_path(identity) for identity in identities}) == 8


@pytest.mark.parametrize("name", ["a\u2028b.md", "a\u0085b.md", "a\u2029b.md", "a\x0bb\x0cc\x1cd.md", "a\rb.md"])
def test_log_keeps_names_with_every_line_end_of_unicode(log_path, name):
    with SentLog(log_path, IDENTITY) as log:
        log.note(name, "1")
        log.note_listed({}, complete=True)
        log.note("b", "1")
    with SentLog(log_path, IDENTITY) as log:
        assert (log.marks, log.complete) == ({name: "1", "b": "1"}, True)


@pytest.mark.parametrize(
    "whose", [{"kind": "git"}, {"installation": "two"}, {"tenant": "u"}, {"source": "other"}, {"format": 1}]
)
def test_log_of_another_client_else_is_not_read(log_path, whose):
    with SentLog(log_path, IDENTITY) as log:
        log.note("a", "1")
        log.note_listed({}, complete=True)
    with SentLog(log_path, IDENTITY.model_copy(update=whose)) as log:
        assert (log.marks, log.complete) == ({}, False)


def test_damaged_log_does_not_count_as_complete(log_path):
    with SentLog(log_path, IDENTITY) as log:
        log.note_listed({"a": "1", "b": "1"}, complete=True)
    lines = log_path.read_bytes().split(b"\n")
    log_path.write_bytes(b"\n".join([lines[0], b'["a\x00', *lines[2:]]))
    with SentLog(log_path, IDENTITY) as log:
        assert (log.marks, log.complete) == ({"b": "1"}, False)
    log_path.write_bytes(b"\n".join([b"?", *lines[1:]]))
    with SentLog(log_path, IDENTITY) as log:
        assert (log.marks, log.complete) == ({}, False)


def test_what_is_being_sent_is_known_after_a_kill_and_what_was_refused_is_not(log_path):
    with SentLog(log_path, IDENTITY) as log:
        log.note_listed({"old": "1"}, complete=True)
        log.begin(["old", "new", "refused"])
        log.note_rejected("old")
        log.note_rejected("refused")
        on_disk = log_path.read_bytes()
    log_path.write_bytes(on_disk)
    with SentLog(log_path, IDENTITY) as log:
        assert (log.marks, log.complete) == ({"old": "1", "new": UNCONFIRMED}, True)


def test_two_runs_of_a_source_do_not_write_one_log(log_path):
    with (
        SentLog(log_path, IDENTITY),
        pytest.raises(SourceInUse, match="another run on this machine is sending source 's'"),
        SentLog(log_path, IDENTITY),
    ):
        pass
    with SentLog(log_path, IDENTITY):
        pass


def test_default_names_are_readable_stable_and_apart(tmp_path):
    handbook = tmp_path / "Hand Büch"
    assert re.fullmatch(r"hand-b-ch-[0-9a-f]{6}", default_name("folder", handbook))
    assert default_name("folder", handbook) == default_name("folder", handbook)
    names = {default_name(kind, tmp_path / name) for kind in ("folder", "git") for name in ("a", "b")}
    assert len(names) == 4
    assert default_name("git", tmp_path / "\udcff").startswith("git-")


# Folder


async def test_folder_sends_documents_and_then_only_changes(service, client, folder, log_path):
    write(folder, a_md="A", sub__b_md="B", sub__c_md="C")
    write(folder, **{".git__x_md": "no", "image.png": "no", ".hidden_md": "no"})
    summary = await ingest_folder(client, folder, log_path=log_path)
    assert service.contents == {"a.md": b"A", "sub/b.md": b"B", "sub/c.md": b"C"}
    assert (summary.sent, summary.skipped, summary.deleted) == (3, 0, 0)

    service.log.clear()
    write(folder, a_md="A2")
    (folder / "sub/c.md").unlink()
    summary = await ingest_folder(client, folder, log_path=log_path)
    assert service.sent == [("PUT", "a.md"), ("DELETE", "sub/c.md")]
    assert (summary.sent, summary.skipped, summary.deleted) == (1, 1, 1)

    service.log.clear()
    await ingest_folder(client, folder, log_path=log_path)
    assert service.sent == []


async def test_deletions_wait_for_uploads(service, client, folder, log_path):
    write(folder, **{f"old__{number}_md": f"text {number}" for number in range(9)})
    await ingest_folder(client, folder, log_path=log_path)
    (folder / "old").rename(folder / "new")
    service.log.clear()
    await ingest_folder(client, folder, log_path=log_path)
    assert [method for method, _ in service.sent] == ["PUT"] * 9 + ["DELETE"] * 9


async def test_emptied_folder_is_not_a_mass_deletion(service, client, folder, log_path):
    write(folder, **{f"{number}_md": f"text {number}" for number in range(20)})
    await ingest_folder(client, folder, log_path=log_path)
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(TooManyDeletions, match="20 of 20"):
        await ingest_folder(client, folder, log_path=log_path)
    assert len(service.contents) == 20
    summary = await ingest_folder(client, folder, log_path=log_path, yes=True)
    assert (summary.deleted, service.contents) == (20, {})


async def test_moved_folder_is_no_mass_deletion(service, client, folder, log_path):
    write(folder, **{f"old__{number}_md": f"text {number}" for number in range(20)})
    await ingest_folder(client, folder, log_path=log_path)
    (folder / "old").rename(folder / "new")
    summary = await ingest_folder(client, folder, log_path=log_path)
    assert (summary.sent, summary.deleted) == (20, 20)
    assert set(service.contents) == {f"new/{number}.md" for number in range(20)}


async def test_links_that_lead_out_are_ignored_files(service, client, folder, log_path, tmp_path):
    (tmp_path / "secret.md").write_text("secret")
    write(folder, a_md="A")
    (folder / "out.md").symlink_to(tmp_path / "secret.md")
    (folder / "in.md").symlink_to(folder / "a.md")
    await ingest_folder(client, folder, log_path=log_path)
    assert service.contents == {"a.md": b"A", "in.md": b"A"}


async def test_refused_document_does_not_stop_the_others_and_is_tried_in_the_next_run(
    service, client, folder, log_path
):
    write(folder, a_md="A", b_md="B")
    service.refuse = {"a.md"}
    summary = await ingest_folder(client, folder, log_path=log_path)
    assert [(failure.document_id, failure.reason) for failure in summary.failed] == [("a.md", "Too large: body: less")]
    assert service.contents == {"b.md": b"B"}
    service.refuse = set()
    summary = await ingest_folder(client, folder, log_path=log_path)
    assert (summary.sent, summary.skipped) == (1, 1)


async def test_broken_run_continues_on_where_it_was(service, client, folder, log_path):
    write(folder, **{f"{number}_md": str(number) for number in range(ROUND_EVENTS + 50)})

    def reported(summary):
        if summary.sent == ROUND_EVENTS:
            service.answers = [httpx.ConnectError("gone")] * 200

    with stamina.set_testing(True, attempts=2), pytest.raises(ServiceUnavailable):
        await ingest_folder(client, folder, log_path=log_path, progress=reported)
    service.answers = []
    assert len(service.contents) == ROUND_EVENTS
    service.log.clear()
    summary = await ingest_folder(client, folder, log_path=log_path)
    assert (summary.skipped, summary.sent, len(service.log)) == (ROUND_EVENTS, 50, 50)
    assert len(service.contents) == ROUND_EVENTS + 50


async def test_service_set_up_again_gets_everything_again(service, client, folder, log_path):
    write(folder, a_md="A", b_md="B")
    await ingest_folder(client, folder, log_path=log_path)
    service.contents.clear()
    service.installation = "two"
    assert (await ingest_folder(client, folder, log_path=log_path)).sent == 2


async def test_service_that_has_indexed_nothing_yet_is_the_same_service(service, client, folder, log_path):
    write(folder, a_md="A", b_md="B")
    await ingest_folder(client, folder, log_path=log_path)
    service.contents.clear()
    service.complete = False
    (folder / "a.md").unlink()
    summary = await ingest_folder(client, folder, log_path=log_path)
    assert (summary.sent, summary.deleted, summary.failed) == (0, 1, [])
    assert service.sent[-1] == ("DELETE", "a.md")


@pytest.mark.parametrize("lost", [True, False])
async def test_deletion_is_found_without_the_log(service, client, folder, log_path, lost):
    write(folder, **{f"{number}_md": str(number) for number in range(8)})
    await ingest_folder(client, folder, log_path=log_path)
    (folder / "3.md").unlink()
    write(folder, **{"5_md": "other"})
    if lost:
        log_path.unlink()
    else:
        log_path.write_bytes(b"garbage\n")
    service.log.clear()
    summary = await ingest_folder(client, folder, log_path=log_path)
    assert service.sent == [("PUT", "5.md"), ("DELETE", "3.md")]
    assert (summary.sent, summary.skipped, summary.deleted, summary.failed) == (1, 6, 1, [])


async def test_list_that_may_lack_something_is_no_evidence_and_is_asked_for_again(service, client, folder, log_path):
    write(folder, a_md="A", b_md="B", c_md="C")
    await ingest_folder(client, folder, log_path=log_path)
    log_path.unlink()
    (folder / "a.md").unlink()
    (folder / "c.md").unlink()
    hidden = service.contents.pop("c.md")
    service.complete = False
    summary = await ingest_folder(client, folder, log_path=log_path)
    assert service.sent[-1] == ("DELETE", "a.md")  # what is listed is there
    [reason] = summary.ignored_files.values()
    assert "are not indexed yet" in reason
    service.contents["c.md"], service.complete = hidden, True
    summary = await ingest_folder(client, folder, log_path=log_path)
    assert (service.sent[-1], summary.failed, summary.ignored_files) == (("DELETE", "c.md"), [], {})


@pytest.mark.parametrize("kind", ["folder", "git"])
async def test_what_is_listed_only_when_all_is_sent_is_found_gone_in_the_same_run(
    service, client, repository, log_path, kind
):
    async def ingest():
        run = ingest_folder if kind == "folder" else ingest_git
        return await run(client, repository.path, log_path=log_path)

    repository.commit(a_md="A", b_md="B")
    await ingest()
    log_path.unlink()
    (repository.path / "a.md").unlink()
    repository.commit(c_md="C")
    late, service.complete = service.contents.pop("a.md"), False

    def indexed(*_arguments, wait_s=None, **_other):
        if service.log[-1][1] == "c.md":
            service.contents.setdefault("a.md", late)
            service.complete = True
        return Service._list(service, *_arguments, wait_s=wait_s, **_other)

    service._list = indexed
    summary = await ingest()
    assert (summary.failed, summary.ignored_files, service.sent[-1]) == ([], {}, ("DELETE", "a.md"))
    assert service.contents == {"b.md": b"B", "c.md": b"C"}


async def test_killed_while_sending_then_deleted(service, client, folder, log_path):
    write(folder, a_md="A")

    async def taken_and_unanswered(request):
        answer = await service(request)
        if request.method != "GET":
            raise httpx.ReadTimeout("killed here")
        return answer

    transport = httpx.MockTransport(taken_and_unanswered)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8081") as http:
        broken = IngestClient(http, retry_timeout_s=WAIT_S)
        with stamina.set_testing(True, attempts=1), pytest.raises(ServiceUnavailable):
            await ingest_folder(broken, folder, log_path=log_path)
    assert service.contents == {"a.md": b"A"}
    (folder / "a.md").unlink()
    await ingest_folder(client, folder, log_path=log_path)
    assert service.contents == {}


async def test_name_and_prefix_go_with_every_event(service, client, folder, log_path):
    write(folder, a_md="A")
    options = SourceOptions(name="team-b", prefix="b/")
    await ingest_folder(client, folder, options, log_path=log_path)
    assert service.contents == {"b/a.md": b"A"}
    assert service.given["b/a.md"]["connector"] == "team-b"
    assert service.given["b/a.md"]["source"] == "a.md"
    (folder / "a.md").unlink()
    await ingest_folder(client, folder, options, log_path=log_path)
    assert service.contents == {}
    assert service.given["b/a.md"] == {"connector": "team-b"}


async def test_another_prefix_moves_the_documents(service, client, folder, log_path):
    write(folder, **{f"{number}_md": str(number) for number in range(20)})
    await ingest_folder(client, folder, log_path=log_path)
    await ingest_folder(client, folder, SourceOptions(prefix="new/"), log_path=log_path)
    assert set(service.contents) == {f"new/{number}.md" for number in range(20)}


async def test_document_of_another_source_is_a_failure_and_its_deletion_is_none_of_ours(
    service, client, folder, log_path
):
    write(folder, a_md="A", b_md="B")
    await ingest_folder(client, folder, log_path=log_path)
    service.conflicts = {"a.md"}
    write(folder, a_md="A2")
    summary = await ingest_folder(client, folder, log_path=log_path)
    assert [failure.document_id for failure in summary.failed] == ["a.md"]
    (folder / "a.md").unlink()
    summary = await ingest_folder(client, folder, log_path=log_path)
    assert [failure.document_id for failure in summary.failed] == ["a.md"]
    assert (await ingest_folder(client, folder, log_path=log_path)).failed == []
    assert service.contents == {"a.md": b"A", "b.md": b"B"}


async def test_take_over_sends_again_what_another_source_owns_by_now(service, client, folder, log_path):
    write(folder, a_md="A", b_md="B")
    await ingest_folder(client, folder, log_path=log_path)
    service.owners["a.md"] = "other"
    assert (await ingest_folder(client, folder, log_path=log_path)).sent == 0
    summary = await ingest_folder(client, folder, SourceOptions(take_over=True), log_path=log_path)
    assert (summary.sent, summary.skipped) == (1, 1)
    assert service.given["a.md"]["take_over"] is True


async def test_bad_source_name_is_stated(client, folder, log_path):
    with pytest.raises(BadSourceName, match="'a b' is not a valid source name"):
        await ingest_folder(client, folder, SourceOptions(name="a b"), log_path=log_path)


@pytest.mark.timeout(60)
async def test_what_is_no_ordinary_file_is_named_never_waited_for_and_no_deletion(service, client, folder, log_path):
    names = {"pipe.md", "socket.md", "loop.md", "dangling.md", "folder.md"}
    left = {"now_a_folder.md", "leads_out.md"}
    write(folder, ok_md="OK")
    for name in names | left:
        (folder / name).write_text(name)
    await ingest_folder(client, folder, log_path=log_path)
    assert len(service.contents) == 8
    for name in names | left:
        (folder / name).unlink()
    os.mkfifo(folder / "pipe.md")
    (folder / "loop.md").symlink_to("loop.md")
    (folder / "dangling.md").symlink_to("nowhere.md")
    (folder / "sub").mkdir()
    (folder / "folder.md").symlink_to("sub")
    (folder / "sub/round").symlink_to("..")
    (folder / "now_a_folder.md").mkdir()
    (folder / "leads_out.md").symlink_to("/dev/tty")
    write_latin_1(folder)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.fspath(folder / "socket.md"))
        summary = await ingest_folder(client, folder, log_path=log_path)
    reasons = {failure.document_id: failure.reason for failure in summary.failed}
    assert reasons.keys() == names
    assert summary.ignored_files == {
        "caf\\xe9.md": "its name is not UTF-8: rename it",
        "leads_out.md": "it is a link to a target outside the folder",
        "sub/round": "files without a suffix are not supported",
    }
    assert "is a pipe" in reasons["pipe.md"]
    assert "is a socket" in reasons["socket.md"]
    assert set(service.contents) == names | {"ok.md"}


async def test_file_that_changes_each_time_it_is_read_is_named(service, client, folder, log_path, monkeypatch):
    write(folder, a_md="A", b_md="B")
    fstat, sizes = os.fstat, itertools.count()

    def growing(descriptor):
        found = fstat(descriptor)
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "a.md":
            return os.stat_result((*found[:6], next(sizes), *found[7:]))
        return found

    monkeypatch.setattr(os, "fstat", growing)
    summary = await ingest_folder(client, folder, log_path=log_path)
    [failure] = summary.failed
    assert (failure.document_id, service.contents) == ("a.md", {"b.md": b"B"})
    assert "changed while it was read" in failure.reason


def test_that_a_place_is_gone_states_nothing_when_its_root_is_gone_too(folder):
    root = folder.resolve()
    write(root, a_md="A")
    (root / "a.md").unlink()
    assert not list_folder(root, root / "a.md").may_hold("a.md")
    root.rmdir()
    with pytest.raises(FileNotFoundError):
        list_folder(root, root / "a.md")


async def test_part_that_may_not_be_listed_is_no_deletion(service, client, folder, log_path, monkeypatch):
    write(folder, sub__a_md="A", b_md="B")
    await ingest_folder(client, folder, log_path=log_path)
    listed = os.scandir

    def denied(path):
        if os.fspath(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", denied)
    (folder / "b.md").unlink()
    (folder / "sub/a.md").unlink()
    summary = await ingest_folder(client, folder, log_path=log_path)
    assert [failure.document_id for failure in summary.failed] == ["sub/"]
    assert service.contents == {"sub/a.md": b"A"}
    monkeypatch.undo()
    assert (await ingest_folder(client, folder, log_path=log_path)).deleted == 1


async def test_folder_that_may_not_be_listed_is_no_deletion(service, client, folder, log_path, monkeypatch):
    write(folder, a_md="A")
    await ingest_folder(client, folder, log_path=log_path)

    def denied(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError):
        await ingest_folder(client, folder, log_path=log_path)
    assert service.contents == {"a.md": b"A"}


async def test_no_folder_is_stated(client, folder, log_path):
    with pytest.raises(NotADirectoryError, match=re.escape("nowhere is not a folder")):
        await ingest_folder(client, folder / "nowhere", log_path=log_path)


async def test_watch_sends_changes_as_they_happen(service, client, folder, log_path):
    write(folder, a_md="A", sub__b_md="B")
    watching = asyncio.create_task(ingest_folder(client, folder, watch=True, log_path=log_path))
    try:
        await service.until(lambda: len(service.contents) == 2)
        write(folder, a_md="A2", new__deep__c_md="C")
        await service.until(lambda: service.contents.get("a.md") == b"A2" and "new/deep/c.md" in service.contents)
        (folder / "sub").rename(folder / "moved")
        await service.until(lambda: {"a.md", "new/deep/c.md", "moved/b.md"} == set(service.contents))
        (folder / "a.md").unlink()
        await service.until(lambda: "a.md" not in service.contents)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    assert watching.cancelled()


async def test_many_small_losses_while_watching_are_a_mass_deletion(service, client, folder, log_path):
    write(folder, **{f"old__{number}_md": f"text {number}" for number in range(40)})
    watching = asyncio.create_task(ingest_folder(client, folder, watch=True, log_path=log_path))
    await service.until(lambda: len(service.contents) == 40)
    (folder / "old").rename(folder / "new")
    await service.until(lambda: set(service.contents) == {f"new/{number}.md" for number in range(40)})
    for number in range(40):
        (folder / f"new/{number}.md").unlink()
    with pytest.raises(TooManyDeletions, match="of 40 documents are missing"):
        await watching
    assert len(service.contents) == 40


# Git


class Repository:
    def __init__(self, path):
        self.path = path
        path.mkdir()
        self("init", "-q", "-b", "main")

    def __call__(self, *arguments):
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
        command = ("git", "-C", str(self.path), *identity, *arguments)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, **files):
        write(self.path, **files)
        self("add", "-A")
        self("commit", "-q", "-m", "change")
        return self("rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path / "repository")


async def test_git_snapshot_then_changes(service, client, repository, log_path):
    repository.commit(a_md="A", sub__b_md="B", **{"x.bin": "no"})
    repository.commit(a_md="A2")
    (repository.path / "link.md").symlink_to("a.md")
    repository.commit()
    summary = await ingest_git(client, repository.path, log_path=log_path)
    assert service.contents == {"a.md": b"A2", "sub/b.md": b"B"}
    assert summary.sent == 2

    service.log.clear()
    (repository.path / "sub/b.md").unlink()
    repository.commit(a_md="A3")
    await ingest_git(client, repository.path, log_path=log_path)
    assert sorted(service.sent) == [("DELETE", "sub/b.md"), ("PUT", "a.md")]
    assert (await ingest_git(client, repository.path, log_path=log_path)).sent == 0


async def test_git_history_from_a_revision_is_sent_commit_by_commit(service, client, repository, log_path):
    first = repository.commit(a_md="A1")
    repository("checkout", "-q", "-b", "side")
    repository.commit(a_md="side", s_md="S")
    repository("checkout", "-q", "main")
    repository.commit(b_md="B")
    repository("merge", "-q", "--no-ff", "-m", "merge", "side")
    repository.commit(a_md="A9")
    await ingest_git(client, repository.path, start=first, log_path=log_path)
    of_a = [content for _, document_id, content in service.log if document_id == "a.md"]
    assert of_a == [b"A1", b"side", b"A9"]
    assert service.contents == {"a.md": b"A9", "b.md": b"B", "s.md": b"S"}
    # Versions are assigned: whatever was there before, of whichever source, is older.
    assert not any("revision" in given for given in service.given.values())


async def test_rewritten_branch_replaces_what_was_sent(service, client, repository, log_path):
    first = repository.commit(a_md="A1")
    repository.commit(a_md="A2")
    repository.commit(b_md="B")
    await ingest_git(client, repository.path, log_path=log_path)
    repository("reset", "-q", "--hard", first)
    await ingest_git(client, repository.path, log_path=log_path)
    assert service.contents == {"a.md": b"A1"}


async def test_shallow_clone_is_sent_and_gives_the_reason_it_lacks_a_revision(
    service, client, repository, log_path, tmp_path
):
    first = repository.commit(a_md="A1")
    repository.commit(a_md="A2", b_md="B")
    shallow = tmp_path / "shallow"
    repository("clone", "-q", "--depth=1", f"file://{repository.path}", str(shallow))
    await ingest_git(client, shallow, log_path=log_path)
    assert service.contents == {"a.md": b"A2", "b.md": b"B"}
    with pytest.raises(GitFailed, match="the clone is shallow"):
        await ingest_git(client, shallow, start=first, log_path=log_path)


async def test_git_names_what_it_cannot_send_and_deletes_nothing_for_it(service, client, repository, log_path):
    repository.commit(a_md="A", b_md="B", c_md="C")
    await ingest_git(client, repository.path, log_path=log_path)
    write_latin_1(repository.path)
    repository.commit(a_md="A2", b_md="B2")
    blob = repository("rev-parse", "HEAD:b.md")
    (repository.path / ".git/objects" / blob[:2] / blob[2:]).unlink()
    summary = await ingest_git(client, repository.path, log_path=log_path)
    assert [failure.document_id for failure in summary.failed] == ["b.md"]
    assert summary.ignored_files == {"caf\\xe9.md": "its name is not UTF-8: rename it"}
    assert service.contents == {"a.md": b"A2", "b.md": b"B", "c.md": b"C"}


async def test_git_deletion_is_found_without_the_log(service, client, repository, log_path):
    repository.commit(a_md="A", b_md="B")
    await ingest_git(client, repository.path, log_path=log_path)
    log_path.unlink()
    (repository.path / "b.md").unlink()
    repository.commit()
    await ingest_git(client, repository.path, log_path=log_path)
    assert service.contents == {"a.md": b"A"}


async def test_folder_and_git_of_one_name_do_not_read_each_others_log(service, client, repository, log_path):
    repository.commit(a_md="A", b_md="B")
    options = SourceOptions(name="wiki")
    await ingest_folder(client, repository.path, options, log_path=log_path)
    (repository.path / "b.md").unlink()
    repository.commit(a_md="A2")
    await ingest_git(client, repository.path, options, log_path=log_path)
    assert service.contents == {"a.md": b"A2"}


async def test_git_follow_sends_new_commits(service, client, repository, log_path, monkeypatch):
    monkeypatch.setattr("ingest.connectors.git.POLL_S", 0.05)
    repository.commit(a_md="A")
    following = asyncio.create_task(ingest_git(client, repository.path, follow=True, log_path=log_path))
    try:
        await service.until(lambda: service.contents == {"a.md": b"A"})
        repository.commit(a_md="A2", b_md="B")
        await service.until(lambda: service.contents == {"a.md": b"A2", "b.md": b"B"})
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_git_guard(service, client, repository, log_path):
    repository.commit(**{f"{number}_md": str(number) for number in range(20)})
    await ingest_git(client, repository.path, log_path=log_path)
    repository("rm", "-q", "-r", ".")
    repository.commit()
    with pytest.raises(TooManyDeletions):
        await ingest_git(client, repository.path, log_path=log_path)
    assert len(service.contents) == 20
    await ingest_git(client, repository.path, log_path=log_path, yes=True)
    assert service.contents == {}


async def test_git_errors_are_stated(client, repository, log_path, tmp_path):
    repository.commit(a_md="A")
    with pytest.raises(GitFailed, match="has no commit '--no-such'"):
        await ingest_git(client, repository.path, start="--no-such", log_path=log_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(GitFailed, match="not a git repository"):
        await ingest_git(client, tmp_path / "empty", log_path=log_path)


# Event file


def event_file(path, *events):
    lines = b"".join(orjson.dumps({"seq": seq, "path": "p.md"} | event) + b"\n" for seq, event in enumerate(events))
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


@pytest.mark.parametrize("name", ["events.jsonl", "events.jsonl.gz"])
async def test_event_file(service, client, tmp_path, log_path, name):
    path = event_file(
        tmp_path / name,
        {"type": "created", "doc_id": "1", "content": "# Größe", "ts": 5},
        {"type": "created", "doc_id": "2", "content_b64": "JVBERg==", "path": "x/y.pdf"},
        {"type": "created", "doc_id": "3", "content": "gone", "path": "z.md"},
        {"type": "updated", "doc_id": "1", "content": "# two"},
        {"type": "deleted", "doc_id": "3"},
        {"type": "renamed", "doc_id": "1", "path": "new/name.txt", "old_path": "p.md", "content_changed": False},
        {"type": "created", "doc_id": "4", "path": "picture.png", "content": "?"},
        {"type": "renamed", "doc_id": "5", "path": "q.md"},
    )
    summary = await ingest_event_file(client, path, log_path=log_path)
    assert service.contents == {"1": b"# two", "2": b"%PDF"}
    assert service.given["1"] == {
        "content_type": "text/plain",
        "file_name": "name.txt",
        "source": "new/name.txt",
        "metadata": {"path": "new/name.txt"},
        "revision": 6,
        "connector": default_name("events", path),
    }
    assert service.given["2"]["content_type"] == "application/pdf"
    assert service.given["3"] == {"revision": 5, "connector": default_name("events", path)}
    assert (summary.sent, summary.deleted) == (5, 1)
    assert [failure.document_id for failure in summary.failed] == ["4", "5"]

    again = await ingest_event_file(client, path, log_path=log_path)
    assert (again.sent, again.deleted, again.skipped) == (0, 0, 6)


async def test_event_file_without_its_log_sends_only_what_is_newer(service, client, tmp_path, log_path):
    first = {"type": "created", "doc_id": "1", "content": "A"}
    path = event_file(tmp_path / "events.jsonl", first, {"type": "created", "doc_id": "2", "content": "B"})
    await ingest_event_file(client, path, log_path=log_path)
    log_path.unlink()
    event_file(path, first, {"type": "updated", "doc_id": "1", "content": "A2"})
    summary = await ingest_event_file(client, path, log_path=log_path)
    assert (summary.sent, summary.skipped, summary.deleted) == (1, 1, 0)
    # That the file does not speak of a document is no deletion.
    assert service.contents == {"1": b"A2", "2": b"B"}


async def test_resumed_rename_has_content_sent_by_the_run_before(service, client, tmp_path, log_path):
    created = {"type": "created", "doc_id": "1", "content": "A"}
    path = event_file(tmp_path / "events.jsonl", created)
    await ingest_event_file(client, path, log_path=log_path)
    event_file(path, created, {"type": "renamed", "doc_id": "1", "path": "b.md"})
    await ingest_event_file(client, path, log_path=log_path)
    assert service.log[-1] == ("PUT", "1", b"A")
    assert service.given["1"]["source"] == "b.md"


async def test_bad_line_is_named_and_what_arrives_before_is_sent(service, client, tmp_path, log_path):
    path = tmp_path / "events.jsonl"
    event_file(path, {"type": "created", "doc_id": "1", "content": "A"})
    with path.open("ab") as file:
        file.write(b'{"seq": 1, "type": "moved", "doc_id": "1", "path": "p.md"}\n')
    with pytest.raises(BadEventFile, match=r"events.jsonl line 2: type: "):
        await ingest_event_file(client, path, log_path=log_path)
    assert service.contents == {"1": b"A"}
