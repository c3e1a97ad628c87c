"""Tenant isolation (I7): every endpoint of a running installation, called with credentials of other tenants."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx
import orjson
import pytest
from joserfc import jwt
from joserfc.jwk import KeySet, RSAKey

from bench.installation import BenchInstallation, installed
from infra.local import Stack

pytestmark = pytest.mark.stack

WAIT_S = 20
SECRET = "The Zephyr merger closes on the ninth of March."
OPEN = "The cafeteria serves zephyr tea at noon."
QUESTION = "What about Zephyr?"
SIGNING = RSAKey.generate_key(2_048, {"kid": "one"}, private=True)
NDJSON = {"content-type": "application/x-ndjson"}


@dataclass(frozen=True)
class Client:
    """A client with a key."""

    key_id: str
    token: str
    installation: BenchInstallation

    async def call(self, method: str, path: str, *, query: bool = False, **request: Any) -> httpx.Response:
        url = (self.installation.query_url if query else self.installation.ingest_url) + path
        headers = {"authorization": f"Bearer {self.token}"} | request.pop("headers", {})
        async with httpx.AsyncClient(timeout=WAIT_S) as client:
            return await client.request(method, url, headers=headers, **request)

    async def put(self, document_id: str, text: str, **headers: str) -> dict[str, Any]:
        """Upload, and wait until the document is searchable and outdated answers are dropped."""
        headers = {"content-type": "text/markdown", **headers}
        response = await self.call("PUT", f"/v1/documents/{document_id}", content=text.encode(), headers=headers)
        assert response.status_code == 202, response.text
        accepted = response.json()
        await self.ended(accepted["event_id"])
        return accepted

    async def ended(self, event_id: str) -> None:
        async def has_ended() -> bool:
            return (await self.call("GET", f"/v1/events/{event_id}")).json()["outcome"] is not None

        await until(has_ended)

    async def ask(self, **fields: Any) -> httpx.Response:
        return await self.call("POST", "/v1/query", query=True, json={"query": QUESTION, "top_k": 50, **fields})

    async def found(self, **fields: Any) -> set[str]:
        response = await self.ask(**fields)
        assert response.status_code == 200, response.text
        return {result["document_id"] for result in response.json()["results"]}


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await condition():  # noqa: ASYNC110 - over HTTP
            await asyncio.sleep(0.02)


async def answers_with(client: Client, status: int) -> None:
    async def answers() -> bool:
        return (await client.ask()).status_code == status

    await until(answers)


def bearer(installation: BenchInstallation, issuer: str, **claims: Any) -> Client:
    """A client with a token of the issuer."""
    payload = {"iss": issuer, "aud": "freshline", "sub": "ada", "exp": time.time() + 60, "scope": "query"} | claims
    return Client("", jwt.encode({"alg": "RS256", "kid": "one"}, payload, SIGNING), installation)


def freshline(installation: BenchInstallation, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "freshline", "keys", *arguments, "--json"]
    environment = dict(installation.launcher.environment)
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def issuer() -> Iterator[str]:
    """URL of an issuer that publishes the key."""
    documents = {"/jwks": KeySet([SIGNING]).as_dict(private=False)}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(documents[self.path]).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        documents["/.well-known/openid-configuration"] = {"issuer": url, "jwks_uri": f"{url}/jwks"}
        yield url
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
async def installation(stack: Stack, issuer: str) -> AsyncIterator[BenchInstallation]:
    environment = {
        "FRESHLINE_JWT__ISSUER": issuer,
        "FRESHLINE_JWT__AUDIENCE": "freshline",
        "FRESHLINE_OPENSEARCH__SHARDS": "1",
        "FRESHLINE_KAFKA__PARTITIONS": "2",
        "FRESHLINE_CREDENTIALS__ANONYMOUS": "rejected",
        "FRESHLINE_CREDENTIALS__REFRESH_S": "0.2",
        "FRESHLINE_CREDENTIALS__AUDIT": "all",
        "FRESHLINE_LOG_LEVEL": "info",
        "FRESHLINE_QUERY__MIN_POSITION_WAIT_S": "0.5",
    }
    async with installed(stack, environment) as running:
        yield running


async def issued(installation: BenchInstallation, *arguments: str) -> Client:
    """A client with a new key, once both services accept it."""
    created = await asyncio.to_thread(freshline, installation, "create", "a test", *arguments)
    client = Client(created["key_id"], created["token"], installation)

    async def is_known() -> bool:
        answers = [await client.ask(), await client.call("GET", "/v1/events/none")]
        return all(answer.status_code != 401 for answer in answers)

    await until(is_known)
    return client


@pytest.fixture(scope="module")
async def acme(installation):
    """A writer of acme, a reader without groups and a reader of its board; the documents are searchable."""
    writer = await issued(installation, "--tenant", "acme", "--scope", "ingest")
    reader = await issued(installation, "--tenant", "acme")
    board = await issued(installation, "--tenant", "acme", "--group", "board")
    await writer.put("tea.md", OPEN, **{"freshline-metadata": '{"team": "kitchen"}'})
    accepted = await writer.put("merger.md", SECRET, **{"freshline-groups": "board", "freshline-title": "Merger"})
    return writer, reader, board, accepted


@pytest.fixture(scope="module")
async def umbrella(installation):
    """A client of another tenant with every scope and groups of the same names."""
    scopes = [part for scope in ("query", "ingest", "admin") for part in ("--scope", scope)]
    client = await issued(installation, "--tenant", "umbrella", *scopes, "--group", "board")
    await client.put("own.md", "Umbrella knows nothing of Zephyr.")
    return client


async def test_questions_find_only_what_the_credential_may_read(acme, umbrella):
    _, reader, board, _ = acme
    for _ in range(2):  # retrieved, then cached
        assert await board.found() == {"tea.md", "merger.md"}
        assert await reader.found() == {"tea.md"}
        assert await umbrella.found() == {"own.md"}
    assert (await reader.ask()).json()["cached"]


async def test_generated_and_cached_answers_are_separate_for_each_access(acme, umbrella):
    _, reader, board, _ = acme
    for client in (board, reader, umbrella, reader, umbrella):
        response = await client.ask(generate=True)
        assert ("ninth of March" in response.text) is (client is board), response.text
        stream = await client.call("POST", "/v1/answers", query=True, json={"query": QUESTION, "top_k": 50})
        assert ("ninth of March" in stream.text) is (client is board), stream.text
        assert "event: done" in stream.text


@pytest.mark.parametrize(
    "filters",
    [
        {"document_id": "merger.md"},
        {"document_id": ["merger.md", "tea.md"]},
        {"title": "Merger"},
        {"metadata.team": "kitchen"},
    ],
)
async def test_filters_never_extend_access(acme, umbrella, filters):
    assert await umbrella.found(filters=filters) == set()
    assert "merger.md" not in await acme[1].found(filters=filters)


@pytest.mark.parametrize(
    "fields",
    [
        {"tenant": "acme"},
        {"groups": ["board"]},
        {"access": {"tenant": "acme"}},
        {"filters": {"tenant": "acme"}},
        {"filters": {"groups": "board"}},
        {"filters": {"metadata.": "x"}},
    ],
)
async def test_a_request_body_cannot_set_tenant_or_groups(umbrella, fields):
    assert (await umbrella.ask(**fields)).status_code == 422


async def test_a_group_named_everyone_has_only_its_members(installation, issuer):
    """For each way to assign the name to a document or a credential, and for cached answers."""
    writer = await issued(installation, "--tenant", "orbit", "--scope", "ingest")
    members = await issued(installation, "--tenant", "orbit", "--group", " * ")
    strangers = [
        await issued(installation, "--tenant", "orbit"),
        await issued(installation, "--tenant", "orbit", "--group", "board", "--group", "everyone"),
    ]
    await writer.put("open.md", OPEN)
    await writer.put("header.md", SECRET, **{"freshline-groups": "* ,,"})
    sent = [
        await writer.call("PUT", "/v1/documents/json.md", json={"text": SECRET, "groups": ["", " * ", "*"]}),
        await writer.call(
            "PUT", "/v1/documents/form.md", data={"groups": " *"}, files={"file": ("form.md", SECRET.encode())}
        ),
    ]
    line = {"document_id": "batch.md", "text": SECRET, "groups": ["*\t"]}
    batch = await writer.call("POST", "/v1/documents:batch", content=orjson.dumps(line), headers=NDJSON)
    accepted = [one.json() for one in sent] + [one["accepted"] for one in batch.json()["outcomes"]]
    for one in accepted:
        await writer.ended(one["event_id"])
    refused = await writer.call("PUT", "/v1/documents/blank.md", json={"text": SECRET, "groups": [" "]})
    assert refused.status_code == 422, "an empty group name is not everyone"
    closed = {"header.md", "json.md", "form.md", "batch.md"}
    for _ in range(2):  # retrieved, then cached
        assert await members.found() == {"open.md"} | closed
        for stranger in strangers:
            assert await stranger.found() == {"open.md"}
    assert await bearer(installation, issuer, tenant="orbit", groups=[" *"]).found() == {"open.md"} | closed
    assert await bearer(installation, issuer, tenant="orbit", groups=["everyone"]).found() == {"open.md"}


@pytest.mark.parametrize("name", ["x-tenant", "x-tenant-id", "freshline-tenant", "x-forwarded-user", "x-groups"])
async def test_headers_cannot_set_tenant_or_groups(umbrella, name):
    response = await umbrella.call(
        "POST", "/v1/query", query=True, json={"query": QUESTION}, headers={name: "acme", "x-api-key": "acme"}
    )
    assert {result["document_id"] for result in response.json()["results"]} == {"own.md"}


async def test_positions_do_not_reveal_events_of_other_tenants(acme, umbrella):
    position = acme[3]["position"]
    response = await umbrella.ask(min_position=position)
    own = (await umbrella.ask()).json()["as_of"]["positions"]
    if response.status_code == 503:
        assert response.json()["as_of"] == own
    else:  # its own events on that partition reach as far
        partition, offset = position.removeprefix("documents.v1-").split(":")
        assert own[partition] >= int(offset)
    assert SECRET not in response.text


async def test_documents_and_events_of_other_tenants_are_not_found(acme, umbrella):
    writer, *_, accepted = acme
    assert (await writer.call("GET", "/v1/documents/merger.md")).status_code == 200
    for path in ("/v1/documents/merger.md", f"/v1/events/{accepted['event_id']}", "/v1/documents/acme%2Fmerger.md"):
        assert (await umbrella.call("GET", path)).status_code == 404, path
        assert (await umbrella.call("GET", path.replace("/v1/", "/v1/../v1/"))).status_code == 404, path


async def test_uploads_and_deletes_affect_only_the_own_tenant(acme, umbrella):
    board = acme[2]
    await umbrella.put("merger.md", "Umbrella writes about Zephyr too.")
    lines = [{"document_id": "merger.md", "deleted": True}, {"document_id": "acme/merger.md", "text": "zephyr"}]
    lines.append({"document_id": "tea.md", "text": "x", "tenant": "acme"})
    body = b"\n".join(map(orjson.dumps, lines))
    outcomes = (await umbrella.call("POST", "/v1/documents:batch", content=body, headers=NDJSON)).json()["outcomes"]
    assert [bool(outcome.get("accepted")) for outcome in outcomes] == [True, True, False]
    deleted = await umbrella.call("DELETE", "/v1/documents/tea.md")
    await umbrella.ended(deleted.json()["event_id"])
    assert await board.found() == {"tea.md", "merger.md"}
    assert SECRET in (await board.ask()).text


async def test_each_scope_allows_only_its_operations(acme, umbrella):
    writer, reader, *_ = acme
    refused = await writer.ask()
    assert (refused.status_code, refused.json()["type"]) == (403, "/problems/forbidden")
    for method, path in (("PUT", "/v1/documents/x.md"), ("DELETE", "/v1/documents/x.md"), ("GET", "/v1/events/x")):
        assert (await reader.call(method, path)).status_code == 403
    assert (await reader.call("POST", "/v1/documents:batch", headers=NDJSON)).status_code == 403
    admin = await issued(umbrella.installation, "--tenant", "acme", "--scope", "admin")
    assert (await admin.ask()).status_code == 403
    assert (await admin.call("PUT", "/v1/documents/x.md")).status_code == 403


@pytest.mark.parametrize("token", ["fl_", "wrong", "fl_0123456789abcdef_" + "0" * 64, "e30.e30.e30"])
async def test_without_a_valid_credential_every_endpoint_is_401(installation, token):
    unauthenticated = Client("", token, installation)
    assert (await unauthenticated.ask()).status_code == 401
    assert (await unauthenticated.call("POST", "/v1/answers", query=True, json={"query": QUESTION})).status_code == 401
    for method, path in (
        ("PUT", "/v1/documents/x.md"),
        ("GET", "/v1/documents/merger.md"),
        ("DELETE", "/v1/documents/x.md"),
        ("GET", "/v1/events/x"),
        ("POST", "/v1/documents:batch"),
    ):
        assert (await unauthenticated.call(method, path)).status_code == 401, path
    async with httpx.AsyncClient() as client:
        assert (await client.post(f"{installation.query_url}/v1/query", json={"query": "x"})).status_code == 401


@pytest.mark.usefixtures("acme")
async def test_a_token_finds_what_its_claims_allow(installation, issuer, umbrella):
    token = partial(bearer, installation, issuer)
    assert await token(tenant="acme", groups=["board"]).found() == {"tea.md", "merger.md"}
    assert await token(tenant="acme", groups=["staff"]).found() == {"tea.md"}
    assert await token(tenant="umbrella", groups=["board"]).found() == await umbrella.found()
    assert (await token(tenant="acme", scope="ingest").ask()).status_code == 403
    for claims in ({}, {"tenant": "acme", "aud": "other"}, {"tenant": "acme", "exp": time.time() - 60}):
        assert (await token(**claims).ask()).status_code == 401
    assert (await token(tenant="acme").call("PUT", "/v1/documents/x.md", content=b"x")).status_code == 403


async def test_rotated_keys_overlap_and_revocation_ends_all(installation):
    first = await issued(installation, "--tenant", "acme")
    created = await asyncio.to_thread(freshline, installation, "rotate", first.key_id, "--overlap-hours", "1")
    second = Client(first.key_id, created["token"], installation)
    await answers_with(second, 200)
    assert (await first.ask()).status_code == 200
    await asyncio.to_thread(freshline, installation, "revoke", first.key_id)
    await answers_with(first, 401)
    await answers_with(second, 401)
    listed = await asyncio.to_thread(freshline, installation, "list")
    [shown] = [key for key in listed["keys"] if key["key_id"] == first.key_id]
    assert (shown["state"], shown["secrets"]) == ("revoked", 2)
    assert first.token.rpartition("_")[2] not in json.dumps(listed)


async def test_the_audit_log_contains_the_subject_and_never_the_content(installation, acme):
    writer, reader, *_ = acme
    await reader.ask()
    for service, client in (("query", reader), ("ingest", writer)):
        log = (installation.launcher.home / f"serve-{service}.log").read_text()
        lines = [orjson.loads(line) for line in log.splitlines() if line.startswith("{")]
        audited = [line for line in lines if line["logger"] == "audit"]
        assert any(line["subject"] == f"key:{client.key_id}" and line["tenant"] == "acme" for line in audited)
        assert any(line["status"] == 401 and line["subject"] is None for line in audited)
        for word in ("Zephyr", "zephyr", "merger.md", writer.token.rpartition("_")[2], reader.token.rpartition("_")[2]):
            assert word not in log
    assert any(line["event_id"] for line in audited)
