"""What both services share: problem details, credentials, body limits, metrics, listening."""

import asyncio
import os
import signal
import socket
from typing import Annotated

import httpx
import pytest
from fastapi import Depends, FastAPI, Query, Request
from prometheus_client import CollectorRegistry
from pydantic import SecretStr
from structlog.testing import capture_logs

from infra.blobs.port import BlobStoreUnavailable
from infra.credentials.api_keys import issue, revoked
from infra.credentials.key_table import RECHECK_S, KeyTable
from infra.credentials.memory_keys import MemoryKeys
from infra.kafka.port import StreamUnavailable
from infra.opensearch.port import IndexUnavailable
from infra.redis.port import CacheUnavailable
from infra.settings import HttpSettings, Settings, TenantSettings
from infra.web.audit import install_audit
from infra.web.bodies import read_body
from infra.web.credentials import Credentials, UnsafeBind, is_loopback, require_safe_bind
from infra.web.metrics import install_metrics
from infra.web.problems import ProblemRaised, install_problems
from infra.web.server import CannotListen, listening, wait_for_shutdown
from schemas.credentials import Scope
from schemas.problems import PROBLEM_MEDIA_TYPE, InvalidField, Problem, ProblemType
from schemas.search import Access

LIMIT_BYTES = 100
KEY = "correct horse"


def client_of(app: FastAPI, url: str = "http://127.0.0.1") -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url=url)


@pytest.fixture
def app():
    app = FastAPI()
    install_problems(app)
    app.state.error = None

    @app.get("/raise")
    async def raising() -> None:
        raise app.state.error

    @app.get("/number/{number}")
    async def number(number: int, at_most: Annotated[int, Query(le=5)] = 5) -> int:
        return number + at_most

    @app.put("/number/{number}")
    async def put(number: int, request: Request) -> int:
        return number + len(await read_body(request, LIMIT_BYTES))

    return app


@pytest.fixture
async def client(app):
    async with client_of(app) as client:
        yield client


def problem_of(response: httpx.Response) -> Problem:
    assert response.headers["content-type"] == PROBLEM_MEDIA_TYPE
    problem = Problem.model_validate_json(response.content)
    assert problem.status == response.status_code
    return problem


async def test_raised_problem_arrives_whole(app, client):
    errors = (InvalidField(field="query", message="too long"),)
    app.state.error = ProblemRaised(
        ProblemType.POSITION_NOT_REACHED, "wait", errors=errors, retry_after_s=0.2, as_of={1: 2}
    )
    response = await client.get("/raise")
    problem = problem_of(response)
    assert (problem.status, problem.type, problem.detail) == (503, "/problems/position-not-reached", "wait")
    assert (problem.errors, problem.as_of, problem.instance) == (errors, {1: 2}, "/raise")
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    "error", [StreamUnavailable("secret"), CacheUnavailable("x"), IndexUnavailable("x"), BlobStoreUnavailable("x")]
)
async def test_store_that_does_not_answer_is_503_with_retry_after(app, client, error):
    app.state.error = error
    response = await client.get("/raise")
    assert problem_of(response).type == "/problems/unavailable"
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert "secret" not in response.text


async def test_unforeseen_error_reveals_nothing(app, client):
    app.state.error = RuntimeError("password=hunter2")
    response = await client.get("/raise")
    assert problem_of(response).type == "/problems/internal"
    assert response.status_code == 500
    assert "hunter2" not in response.text


async def test_wrong_parameters_name_field_and_limit(client):
    problem = problem_of(await client.get("/number/x?at_most=6"))
    assert problem.status == 422
    assert [error.field for error in problem.errors] == ["number", "at_most"]
    assert "less than or equal to 5" in problem.errors[1].message


async def test_no_such_path_and_no_such_method(client):
    assert problem_of(await client.get("/nowhere")).type == "/problems/not-found"
    response = await client.delete("/number/1")
    assert problem_of(response).status == 405
    assert response.headers["allow"] == "GET, PUT"


async def test_body_up_to_the_limit_is_read(client):
    assert (await client.put("/number/0", content=b"x" * LIMIT_BYTES)).json() == LIMIT_BYTES


async def test_declared_body_beyond_the_limit_is_refused_unread(app):
    sent: list[dict] = []

    async def receive():
        raise AssertionError("the body was read")

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "PUT",
        "path": "/number/1",
        "query_string": b"",
        "headers": [(b"content-length", str(LIMIT_BYTES + 1).encode())],
    }
    await app(scope, receive, send)
    assert sent[0]["status"] == 413
    assert Problem.model_validate_json(sent[1]["body"]).errors[0].message == f"exceeds the limit of {LIMIT_BYTES} bytes"


async def test_undeclared_body_is_refused_as_soon_as_it_is_too_large(client):
    pulled = 0

    async def endless():
        nonlocal pulled
        while True:
            pulled += 60
            yield b"x" * 60

    # ASGITransport pulls a chunk for each receive, so what is pulled is what the application asked for.
    assert problem_of(await client.put("/number/1", content=endless())).status == 413
    assert pulled == 120


def credentialed(tenant: TenantSettings) -> FastAPI:
    app = FastAPI()
    install_problems(app)

    @app.get("/")
    async def who(
        access: Annotated[Access, Depends(Credentials(Settings(tenant=tenant)).requiring(Scope.QUERY))],
    ) -> str:
        return access.tenant

    return app


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer {KEY}"},
        {"X-API-Key": KEY},
    ],
)
async def test_right_key_gives_the_tenant_at_any_host(headers):
    async with client_of(credentialed(TenantSettings(default="acme", api_key=SecretStr(KEY))), "http://docs.acme") as c:
        assert (await c.get("/", headers=headers)).json() == "acme"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": "Bearer wrong", "X-API-Key": KEY},
        {"X-API-Key": f"{KEY}x"},
        {"X-API-Key": ""},
        {"X-API-Key": "ä".encode()},
    ],
)
async def test_wrong_key_is_401(headers):
    async with client_of(credentialed(TenantSettings(api_key=SecretStr(KEY)))) as client:
        response = await client.get("/", headers=headers)
    assert problem_of(response).type == "/problems/unauthenticated"
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert KEY not in response.text


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:80", "localhost:8081", "[::1]:8081", "LOCALHOST"])
async def test_open_service_answers_this_machine(host):
    async with client_of(credentialed(TenantSettings())) as client:
        assert (await client.get("/", headers={"Host": host})).json() == "local"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1:8081", ""])
async def test_open_service_refuses_a_foreign_name(host):
    async with client_of(credentialed(TenantSettings())) as client:
        problem = problem_of(await client.get("/", headers={"Host": host}))
    assert problem.type == "/problems/forbidden"
    assert "FRESHLINE_TENANT__API_KEY" in problem.detail


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_only_loopback_may_be_bound_without_a_key(host, loopback):
    assert is_loopback(host) is loopback
    require_safe_bind(host, Settings(tenant=TenantSettings(api_key=SecretStr(KEY))))
    if loopback:
        require_safe_bind(host, Settings())
    else:
        with pytest.raises(UnsafeBind, match="FRESHLINE_TENANT__API_KEY"):
            require_safe_bind(host, Settings())


async def test_metrics_know_routes_not_ids(app, client):
    install_metrics(app, service="ingest", registry=CollectorRegistry())
    await client.get("/number/41")
    await client.get("/number/42")
    await client.get("/number/x")
    await client.get("/secret/path")
    page = (await client.get("/metrics")).text
    labels = 'freshline_http_request_seconds_count{method="GET",route="/number/{number}",service="ingest",status='
    assert f'{labels}"200"}} 2.0' in page
    assert f'{labels}"422"}} 1.0' in page
    assert 'method="(none)",route="(none)",service="ingest",status="404"} 1.0' in page
    assert "secret" not in page


async def test_stopping_lets_a_request_finish_and_takes_no_more():
    app = FastAPI()
    entered, leave = asyncio.Event(), asyncio.Event()

    @app.get("/slow")
    async def slow() -> str:
        entered.set()
        await leave.wait()
        return "whole"

    async with httpx.AsyncClient() as client:
        async with listening(app, HttpSettings(), Settings()) as url:
            answer = asyncio.create_task(client.get(f"{url}/slow"))
            await asyncio.wait_for(entered.wait(), 5)
            asyncio.get_running_loop().call_later(0.2, leave.set)
        assert (await answer).json() == "whole"
        with pytest.raises(httpx.ConnectError):
            await client.get(f"{url}/slow")


async def test_taken_port_is_stated():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen, match=f"cannot listen on 127.0.0.1 port {port}"):
            async with listening(FastAPI(), HttpSettings(port=port), Settings()):
                pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_ends_the_wait_and_leaves_no_handler(number):
    waiting = asyncio.create_task(wait_for_shutdown())
    await asyncio.sleep(0)
    os.kill(os.getpid(), number)
    await asyncio.wait_for(waiting, 5)
    # A second signal ends a shutdown that hangs.
    assert signal.getsignal(number) in {signal.SIG_DFL, signal.default_int_handler}


class Clock:
    s = 100.0


@pytest.fixture
async def keyed():
    """An application with a key of every kind of right, and what changes them."""
    store, clock = MemoryKeys(), Clock()
    table = KeyTable(store, refresh_s=5, stale_s=60, monotonic_s=lambda: clock.s, now_ms=lambda: clock.s * 1_000)
    key, token = issue(
        bytes(range(40)), label="x", tenant="acme", groups=("staff",), scopes=(Scope.QUERY,), now_ms=0, expires_ms=None
    )
    await store.add(key)
    await table.refresh()
    credentials = Credentials(Settings(), keys=table, monotonic_s=lambda: clock.s)
    app = FastAPI()
    install_problems(app)
    install_audit(app, "changes")
    for scope in Scope:

        async def who(access: Annotated[Access, Depends(credentials.requiring(scope))]) -> list[str]:
            return [access.tenant, *access.groups]

        app.get(f"/{scope}/{{name}}")(who)
    return app, store, table, clock, credentials, str(token)


async def test_a_key_of_the_table_gives_its_tenant_groups_and_scopes(keyed):
    app, *_, token = keyed
    async with client_of(app, "http://anywhere.example") as client:
        headers = {"Authorization": f"Bearer {token}"}
        assert (await client.get("/query/x", headers=headers)).json() == ["acme", "staff"]
        for scope in ("ingest", "admin"):
            assert problem_of(await client.get(f"/{scope}/x", headers=headers)).type == "/problems/forbidden"


async def test_a_wrong_credential_is_no_anonymous_one(keyed):
    app, *_ = keyed
    async with client_of(app) as client:
        assert (await client.get("/query/x")).json() == ["local"]
        assert (await client.get("/query/x", headers={"X-API-Key": "fl_wrong"})).status_code == 401


async def test_a_verified_key_needs_one_lookup_until_it_is_read_again(keyed):
    app, store, table, clock, credentials, token = keyed
    assert credentials.cached(token) is None
    principal = await credentials.identify({"x-api-key": token})
    assert credentials.cached(token) is principal
    await store.change(principal.subject.removeprefix("key:"), lambda key: revoked(key, now_ms=1))
    await table.refresh()
    clock.s += RECHECK_S
    assert credentials.cached(token) is None
    async with client_of(app) as client:
        assert (await client.get("/query/x", headers={"X-API-Key": token})).status_code == 401


async def test_keys_that_cannot_be_read_are_503_not_401(keyed):
    app, store, table, clock, _, token = keyed
    store.available = False
    clock.s += 61
    await table.refresh()
    async with client_of(app) as client:
        response = await client.get("/query/x", headers={"X-API-Key": token})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


async def test_the_audit_log_has_refusals_and_changes_and_no_content(keyed):
    app, *_, token = keyed
    with capture_logs() as lines:
        async with client_of(app) as client:
            await client.get("/query/plans?q=plans", headers={"X-API-Key": token})
            await client.get("/ingest/plans?q=plans", headers={"X-API-Key": token})
            await client.get("/ingest/plans?q=plans")
            await client.get("/query/plans", headers={"X-API-Key": "wrong"})
    audited = [line for line in lines if line["event"] == "request"]
    reported = [(line["subject"], line["tenant"], line["route"], line["status"]) for line in audited]
    assert reported == [
        ("key:0001020304050607", "acme", "/ingest/{name}", 403),
        ("installation", "local", "/ingest/{name}", 200),
        (None, None, "/query/{name}", 401),
    ]
    assert "plans" not in str(lines)
    assert token.rpartition("_")[2] not in str(lines)
