"""The webhooks of a tenant: who is told of the ends of its events."""

import secrets
import time
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Response

from infra.settings import WebhookSettings
from infra.web.credentials import AccessOf
from infra.web.problems import ProblemRaised, invalid, problems_told
from infra.webhooks.port import WebhookStore
from infra.webhooks.signing import SECRET_BYTES, key_of, made_secret
from infra.webhooks.targets import TargetRefused, checked_url
from schemas.problems import InvalidField, ProblemType
from schemas.search import Access
from schemas.webhooks import (
    MAX_WEBHOOKS,
    SIGNED_HEADERS,
    KeptWebhook,
    NewWebhook,
    Webhook,
    WebhookCreated,
    WebhookId,
    WebhookMessage,
    Webhooks,
)

_ID_BYTES: Final = 8


class TenantWebhooks:
    """The webhooks of each tenant; nobody sees those of another."""

    def __init__(self, store: WebhookStore, settings: WebhookSettings) -> None:
        self._store = store
        self._settings = settings

    async def add(self, tenant: str, new: NewWebhook) -> WebhookCreated:
        """Keep a new one.

        Raises:
            ProblemRaised: it may not lead there, its secret is none, or the tenant has too many.
        """
        _check(new, self._settings)
        if len(await self._of(tenant)) >= MAX_WEBHOOKS:
            raise ProblemRaised(ProblemType.INVALID_REQUEST, f"a tenant has {MAX_WEBHOOKS} webhooks at most")
        webhook = KeptWebhook(
            webhook_id=secrets.token_hex(_ID_BYTES),
            tenant=tenant,
            url=new.url,
            secret=new.secret or made_secret(secrets.token_bytes(SECRET_BYTES)),
            outcomes=tuple(dict.fromkeys(new.outcomes)),
            description=new.description,
            created_ms=time.time() * 1000,
        )
        await self._store.add(webhook)
        return WebhookCreated(webhook=webhook.shown(0), secret=webhook.secret)

    async def all(self, tenant: str) -> Webhooks:
        """All of a tenant's."""
        waiting = await self._store.waiting()
        return Webhooks(webhooks=tuple(one.shown(waiting.get(one.webhook_id, 0)) for one in await self._of(tenant)))

    async def get(self, tenant: str, webhook_id: str) -> Webhook:
        """One of them.

        Raises:
            ProblemRaised: there is none.
        """
        for one in (await self.all(tenant)).webhooks:
            if one.webhook_id == webhook_id:
                return one
        raise ProblemRaised(ProblemType.NOT_FOUND, f"there is no webhook {webhook_id}")

    async def remove(self, tenant: str, webhook_id: str) -> None:
        """Forget one of them, and what waits for it; raises as ``get``."""
        await self.get(tenant, webhook_id)
        await self._store.remove(webhook_id)

    async def resume(self, tenant: str, webhook_id: str) -> Webhook:
        """Try one of them at once; raises as ``get``."""
        await self.get(tenant, webhook_id)
        await self._store.change(webhook_id, _resumed)
        return await self.get(tenant, webhook_id)

    async def _of(self, tenant: str) -> list[KeptWebhook]:
        return [one for one in await self._store.webhooks() if one.tenant == tenant]


def webhook_routes(webhooks: TenantWebhooks, admin: AccessOf) -> APIRouter:
    """The routes."""
    router = APIRouter(prefix="/v1/webhooks")
    may = Depends(admin)

    @router.post("", status_code=201, responses=problems_told(400, 401, 403, 422, 503))
    async def post_webhook(new: NewWebhook, access: Annotated[Access, may]) -> WebhookCreated:
        """Be told of the end of each event, signed, at least once. Workers know of it within a few seconds.

        The answer has the secret, this once.
        """
        return await webhooks.add(access.tenant, new)

    @router.get("", responses=problems_told(401, 403, 503))
    async def list_webhooks(access: Annotated[Access, may]) -> Webhooks:
        """All of them and how they are doing, without their secrets."""
        return await webhooks.all(access.tenant)

    @router.get("/{webhook_id}", responses=problems_told(401, 403, 404, 422, 503))
    async def get_webhook(webhook_id: WebhookId, access: Annotated[Access, may]) -> Webhook:
        """One of them."""
        return await webhooks.get(access.tenant, webhook_id)

    @router.delete("/{webhook_id}", status_code=204, responses=problems_told(401, 403, 404, 422, 503))
    async def delete_webhook(webhook_id: WebhookId, access: Annotated[Access, may]) -> Response:
        """Be told no more. What waits for it is dropped; workers may go on for a few seconds."""
        await webhooks.remove(access.tenant, webhook_id)
        return Response(status_code=204)

    @router.post("/{webhook_id}/resume", responses=problems_told(401, 403, 404, 422, 503))
    async def resume_webhook(webhook_id: WebhookId, access: Annotated[Access, may]) -> Webhook:
        """Try what waits at once, and take a disabled webhook into service again.

        What ended while it was disabled was not kept for it.
        """
        return await webhooks.resume(access.tenant, webhook_id)

    return router


def webhook_messages() -> APIRouter:
    """What receivers are sent, for the description."""
    messages = APIRouter()
    headers = [
        {"name": name, "in": "header", "required": True, "description": about, "schema": {"type": "string"}}
        for name, about in SIGNED_HEADERS.items()
    ]

    @messages.post("event.ended", openapi_extra={"parameters": headers}, status_code=204)
    def event_ended(message: WebhookMessage) -> None:
        """An event ended. Answer soon, with a status from 200 to 299; 410 ends it for good, all else is tried again."""

    return messages


def _resumed(webhook: KeptWebhook) -> KeptWebhook:
    # Not as if nothing had failed: until a try shows that it is well, what ends is kept for it.
    since_ms = None if webhook.failing_since_ms is None else time.time() * 1000
    return webhook.model_copy(
        update={"disabled_ms": None, "next_try_ms": None, "failures": 0, "failing_since_ms": since_ms}
    )


def _check(new: NewWebhook, settings: WebhookSettings) -> None:
    wrong = []
    try:
        checked_url(new.url, settings.targets)
    except TargetRefused as error:
        wrong.append(InvalidField(field="url", message=str(error)))
    try:
        if new.secret is not None:
            key_of(new.secret)
    except ValueError as error:
        wrong.append(InvalidField(field="secret", message=str(error)))
    if wrong:
        raise invalid("the webhook cannot be kept", wrong)
