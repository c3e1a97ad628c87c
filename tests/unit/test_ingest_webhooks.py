"""The API of webhooks: who may, what is refused, and that secrets are shown once."""

import httpx
import pytest
from fastapi import FastAPI

from infra.settings import WebhookSettings
from infra.web.problems import install_problems
from infra.webhooks.memory import MemoryWebhooks
from ingest.webhooks_api import TenantWebhooks, webhook_routes
from schemas.documents import Outcome
from schemas.search import Access
from schemas.webhooks import MAX_WEBHOOKS

URL = "https://example.com/hook"


class World:
    def __init__(self):
        self.store, self.tenant = MemoryWebhooks(), "acme"
        app = FastAPI()
        install_problems(app)

        async def admin():
            return Access(self.tenant)

        app.include_router(webhook_routes(TenantWebhooks(self.store, WebhookSettings()), admin))
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingest")

    async def add(self, **reported):
        return await self.http.post("/v1/webhooks", json={"url": URL} | reported)


@pytest.fixture
async def world():
    made = World()
    async with made.http:
        yield made


async def test_a_webhook_is_made_with_a_secret_that_is_shown_once(world):
    made = await world.add(description="the wiki", outcomes=["done", "dead_letter", "done"])
    assert made.status_code == 201
    webhook, secret = made.json()["webhook"], made.json()["secret"]
    assert secret.startswith("whsec_")
    assert webhook["outcomes"] == ["done", "dead_letter"]
    assert (webhook["state"], webhook["waiting"]) == ("active", 0)
    for path in ("/v1/webhooks", f"/v1/webhooks/{webhook['webhook_id']}"):
        shown = await world.http.get(path)
        assert shown.status_code == 200
        assert secret not in shown.text
        assert webhook["webhook_id"] in shown.text
    [kept] = await world.store.webhooks()
    assert (kept.secret, kept.tenant) == (secret, "acme")


async def test_a_given_secret_is_taken_and_all_outcomes_are_reported_by_default(world):
    secret = "whsec_" + "QUFB" * 11
    made = await world.add(secret=secret)
    assert made.json()["secret"] == secret
    assert made.json()["webhook"]["outcomes"] == [str(outcome) for outcome in Outcome]


@pytest.mark.parametrize(
    ("reported", "field"),
    [
        ({"url": "http://example.com/"}, "url"),
        ({"url": "https://169.254.169.254/"}, "url"),
        ({"url": ""}, "url"),
        ({"secret": "whsec_short"}, "secret"),
        ({"secret": "whsec_" + "a" * 33}, "secret"),
        ({"outcomes": []}, "outcomes"),
        ({"outcomes": ["soon"]}, "outcomes"),
        ({"events": ["done"]}, "events"),
        ({"description": "x" * 201}, "description"),
    ],
)
async def test_what_is_wrong_is_refused_by_its_field(world, reported, field):
    refused = await world.add(**reported)
    assert refused.status_code == 422
    assert any(error["field"].split(".")[0] == field for error in refused.json()["errors"]), refused.json()
    assert "whsec_" + "a" * 33 not in refused.text
    assert await world.store.webhooks() == []


async def test_no_caller_sees_or_touches_those_of_another_tenant(world):
    name = (await world.add()).json()["webhook"]["webhook_id"]
    world.tenant = "umbrella"
    assert (await world.http.get("/v1/webhooks")).json() == {"webhooks": []}
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/resume")):
        assert (await world.http.request(method, f"/v1/webhooks/{name}{path}")).status_code == 404
    assert len(await world.store.webhooks()) == 1


async def test_a_tenant_has_so_many_at_most(world):
    for _ in range(MAX_WEBHOOKS):
        assert (await world.add()).status_code == 201
    assert (await world.add()).status_code == 422
    world.tenant = "umbrella"
    assert (await world.add()).status_code == 201


async def test_one_that_is_disabled_is_taken_into_service_again(world):
    name = (await world.add()).json()["webhook"]["webhook_id"]
    fields = {
        "failures": 9,
        "failing_since_ms": 1.0,
        "disabled_ms": 2.0,
        "last_failure": "the receiver responded with 500",
    }
    await world.store.change(name, lambda known: known.model_copy(update=fields))
    assert (await world.http.get(f"/v1/webhooks/{name}")).json()["state"] == "disabled"
    resumed = await world.http.post(f"/v1/webhooks/{name}/resume")
    assert (resumed.json()["state"], resumed.json()["failures"]) == ("failing", 0)


async def test_a_removed_one_is_gone(world):
    name = (await world.add()).json()["webhook"]["webhook_id"]
    assert (await world.http.delete(f"/v1/webhooks/{name}")).status_code == 204
    assert (await world.http.delete(f"/v1/webhooks/{name}")).status_code == 404
    assert (await world.http.get(f"/v1/webhooks/{'x' * 16}")).status_code == 422


async def test_a_store_that_is_out_is_reported(world):
    world.store.available = False
    refused = await world.add()
    assert refused.status_code == 503
    assert refused.headers["content-type"] == "application/problem+json"
