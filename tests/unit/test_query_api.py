"""HTTP API: validation, problems, OpenAPI, readiness, and the console page."""

import asyncio
import base64
import re
from hashlib import sha256

import httpx
import pytest
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from infra.embedding.port import EmbeddingError, EmbeddingThrottled
from infra.opensearch.port import IndexUnavailable
from infra.redis.port import CacheUnavailable
from infra.settings import Settings, TenantSettings
from infra.web.credentials import Credentials
from infra.web.limits import OverLimit, TenantLimit
from query.api.app import ApiPolicy, ApiServices, ApiTelemetry, build_app, question_limit
from query.cache.freshness import PositionNotReached
from query.operations.endpoints import Dependency, Operations
from query.telemetry.rolling_stats import RollingStats
from schemas.positions import AsOf, Position
from schemas.problems import Problem
from schemas.queries import QueryRequest, QueryResponse
from schemas.search import Access

ANSWER = QueryResponse(
    results=(), query_time_ms=1, cached=False, as_of=AsOf(positions={3: 42}, checked_ms=1)
).model_dump_json()


class Answers:
    """Fake AnswerService: records requests, then returns the answer or raises the error."""

    def __init__(self):
        self.asked: list[tuple[QueryRequest, Access]] = []
        self.error: Exception | None = None

    async def answer(self, request, access):
        self.asked.append((request, access))
        if self.error:
            raise self.error
        return ANSWER.encode()


class Streams:
    """Fake AnswerStreams."""

    async def begin(self, _request, _access):
        raise AssertionError("unexpected call")


class Fault:
    error: Exception | None = None

    async def check(self):
        if self.error:
            raise self.error


@pytest.fixture
def answers():
    return Answers()


@pytest.fixture
def faults():
    return {"index": Fault(), "redis": Fault()}


def client_of(answers, faults, tenant, **policy):
    dependencies = {name: Dependency(fault.check, required=name == "index") for name, fault in faults.items()}
    credentials = Credentials(Settings(tenant=tenant))
    operations = Operations(dependencies, RollingStats())
    app = build_app(
        ApiServices(answers, Streams(), None, operations),
        ApiPolicy(credentials, **policy),
        ApiTelemetry(CollectorRegistry()),
    )
    # Errors become responses; they are not raised into the test.
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


@pytest.fixture
async def client(answers, faults):
    async with client_of(answers, faults, TenantSettings()) as client:
        yield client


@pytest.mark.parametrize("path", ["/v1/query", "/query"])
async def test_a_question_is_answered(client, answers, path):
    response = await client.post(path, json={"query": " days? ", "top_k": 3, "filters": {"metadata.year": [2024, "x"]}})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.text == ANSWER
    [(request, access)] = answers.asked
    assert (request.query, request.top_k, request.filters) == ("days?", 3, {"metadata.year": (2024, "x")})
    assert access == Access("local")


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({}, "query", "required"),
        ({"query": "   "}, "query", "at least 1"),
        ({"query": "\x1c"}, "query", "no text"),
        ({"query": "x" * 2_001}, "query", "at most 2000"),
        ({"query": "x", "top_k": 51}, "top_k", "50"),
        ({"query": "x", "tenant": "umbrella"}, "tenant", "not permitted"),
        ({"query": "x", "filters": {"tenant": "umbrella"}}, "filters", "cannot filter by 'tenant'"),
        ({"query": "x", "min_position": "3:42"}, "min_position", "is not a position such as"),
    ],
)
async def test_an_invalid_field_is_reported_with_its_constraint(client, answers, body, field, message):
    response = await client.post("/v1/query", json=body)
    problem = Problem.model_validate_json(response.text)
    assert (response.status_code, problem.type) == (422, "/problems/invalid-request")
    assert response.headers["content-type"] == "application/problem+json"
    assert problem.errors[0].field.startswith(field)
    assert message in problem.errors[0].message
    assert not answers.asked


@pytest.mark.parametrize("content", [b"", b"{", b'{"query": "\\ud800"}', b"[1]"])
async def test_a_body_that_is_not_a_json_object_is_rejected(client, content):
    response = await client.post("/v1/query", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 422


async def test_other_content_types_and_large_bodies_are_rejected(client):
    response = await client.post("/v1/query", content=b'{"query": "x"}', headers={"Content-Type": "text/plain"})
    assert response.status_code == 415
    response = await client.post("/v1/query", json={"query": "x", "filters": {"title": ["y" * 999] * 999}})
    assert response.status_code == 413


AT_4 = PositionNotReached(Position(3, 42), AsOf(positions={3: 4}, checked_ms=1))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (AT_4, (503, "/problems/position-not-reached", "1")),
        (IndexUnavailable("secret host"), (503, "/problems/unavailable", "1")),
        (EmbeddingThrottled("busy", retry_after_s=2.5), (503, "/problems/unavailable", "3")),
        (EmbeddingError("secret host"), (503, "/problems/unavailable", "1")),
        (RuntimeError("secret host"), (500, "/problems/internal", None)),
    ],
)
async def test_a_failure_is_a_problem_with_retry_after(client, answers, error, expected):
    answers.error = error
    response = await client.post("/v1/query", json={"query": "x"})
    problem = Problem.model_validate_json(response.text)
    assert (response.status_code, problem.type, response.headers.get("retry-after")) == expected
    assert problem.as_of == ({3: 4} if error is AT_4 else None)
    assert "secret" not in response.text
    assert problem.instance == "/v1/query"


async def test_an_api_key_is_required_if_configured(answers, faults):
    tenant = TenantSettings(default="acme", api_key=SecretStr("k1"))
    async with client_of(answers, faults, tenant) as client:
        assert (await client.post("/v1/query", json={"query": "x"})).status_code == 401
        allowed = await client.post("/v1/query", json={"query": "x"}, headers={"X-API-Key": "k1"})
        assert allowed.status_code == 200
        assert answers.asked[0][1].tenant == "acme"
        for open_path in ("/", "/health", "/ready"):
            assert (await client.get(open_path)).status_code == 200


async def test_a_tenant_above_its_rate_limit_gets_retry_after(answers, faults):
    async with client_of(answers, faults, TenantSettings(), limit=question_limit(2)) as client, asyncio.timeout(60):
        responses = [await client.post("/v1/query", json={"query": "x"})]
        while responses[-1].status_code == 200:
            responses.append(await client.post("/v1/query", json={"query": "x"}))
    assert len(answers.asked) == len(responses) - 1 >= 2
    problem = Problem.model_validate_json(responses[-1].text)
    assert (problem.status, problem.type) == (429, "/problems/rate-limited")
    assert "2 questions in a second" in problem.detail
    assert int(responses[-1].headers["retry-after"]) >= 1


def test_rate_limits_are_per_tenant():
    limit = TenantLimit("things in a minute", per_minute=10)
    limit.take("acme", 10)
    with pytest.raises(OverLimit) as raised:
        limit.take("acme")
    assert 1 <= raised.value.retry_after_s <= 60
    limit.take("umbrella", 10)
    for _ in range(1_000):
        TenantLimit("things").take("acme", 100)


async def test_readiness_distinguishes_required_and_optional_dependencies(client, faults):
    assert (await client.get("/ready")).json() == {
        "status": "ready",
        "dependencies": {"index": "ready", "redis": "ready"},
    }
    faults["redis"].error = CacheUnavailable("Redis: refused")
    degraded = await client.get("/ready")
    assert (degraded.status_code, degraded.json()["status"]) == (200, "degraded")
    assert degraded.json()["dependencies"]["redis"] == "Redis: refused"
    faults["index"].error = IndexUnavailable("no index")
    unavailable = await client.get("/ready")
    assert (unavailable.status_code, unavailable.json()["status"]) == (503, "unavailable")


async def test_metrics_count_requests_by_route(client):
    await client.post("/v1/query", json={"query": "x"})
    text = (await client.get("/metrics")).text
    assert (
        'freshline_http_request_seconds_count{method="POST",route="/v1/query",service="query",status="200"} 1.0' in text
    )


async def test_openapi_describes_question_answer_and_problems(client):
    document = (await client.get("/openapi.json")).json()
    assert set(document["paths"]) == {
        "/v1/query",
        "/v1/answers",
        "/v1/cache:explain",
        "/health",
        "/ready",
        "/performance-summary",
    }
    operation = document["paths"]["/v1/query"]["post"]
    request_body = operation["requestBody"]["content"]["application/json"]
    assert set(request_body["schema"]["properties"]) == set(QueryRequest.model_fields)
    QueryRequest.model_validate(request_body["example"])
    response_body = operation["responses"]["200"]["content"]["application/json"]
    assert response_body["schema"] == {"$ref": "#/components/schemas/QueryResponse"}
    QueryResponse.model_validate(response_body["example"])
    for status in ("401", "403", "413", "415", "422", "429", "503"):
        content = operation["responses"][status]["content"]
        assert content == {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}, status


async def test_the_console_is_self_contained_and_its_policy_allows_nothing_else(client):
    response = await client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        assert f"{tag}-src 'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'" in policy
    assert not re.findall(
        r"""(?:src|href)\s*=\s*["']?(?!data:,)[\w/]""", re.sub(r"<script>.*", "", response.text, flags=re.DOTALL)
    )
    assert not re.findall(r" (?:style|on\w+)=", response.text)
    assert "innerHTML" not in response.text
