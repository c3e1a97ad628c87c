"""Webhook API: per-tenant notifications of event outcomes."""

import secrets
import time
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Response

from infra.settings import WebhookSettings
from infra.web.credentials import AccessOf
from infra.web.problems import ProblemRaised, invalid, problem_responses
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
    """Webhooks by tenant. Tenants are isolated from each other."""

    def __init__(self, store: WebhookStore, settings: WebhookSettings) -> None:
        self._store = store
        self._settings = settings

    async def add(self, tenant: str, new: NewWebhook) -> WebhookCreated:
        """Create a webhook.

        Raises:
            ProblemRaised: its URL or secret is invalid, or the tenant has the maximum number of webhooks.
        """
        _check(new, self._settings)
        if len(await self._of(tenant)) >= MAX_WEBHOOKS:
            raise ProblemRaised(ProblemType.INVALID_REQUEST, f"the tenant has the maximum of {MAX_WEBHOOKS} webhooks")
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
        """All webhooks of a tenant."""
        waiting = await self._store.waiting()
        webhooks = await self._of(tenant)
        return Webhooks(webhooks=tuple(webhook.shown(waiting.get(webhook.webhook_id, 0)) for webhook in webhooks))

    async def get(self, tenant: str, webhook_id: str) -> Webhook:
        """A webhook of a tenant.

        Raises:
            ProblemRaised: no such webhook.
        """
        for webhook in (await self.all(tenant)).webhooks:
            if webhook.webhook_id == webhook_id:
                return webhook
        raise ProblemRaised(ProblemType.NOT_FOUND, f"no webhook {webhook_id}")

    async def remove(self, tenant: str, webhook_id: str) -> None:
        """Delete a webhook and its pending messages; raises as ``get``."""
        await self.get(tenant, webhook_id)
        await self._store.remove(webhook_id)

    async def resume(self, tenant: str, webhook_id: str) -> Webhook:
        """Re-enable a webhook and retry immediately; raises as ``get``."""
        await self.get(tenant, webhook_id)
        await self._store.change(webhook_id, _resumed)
        return await self.get(tenant, webhook_id)

    async def _of(self, tenant: str) -> list[KeptWebhook]:
        return [webhook for webhook in await self._store.webhooks() if webhook.tenant == tenant]


def webhook_routes(webhooks: TenantWebhooks, admin: AccessOf) -> APIRouter:
    """Routes of the webhook API."""
    router = APIRouter(prefix="/v1/webhooks")
    administrator = Depends(admin)

    @router.post("", status_code=201, responses=problem_responses(400, 401, 403, 422, 503))
    async def post_webhook(new: NewWebhook, access: Annotated[Access, administrator]) -> WebhookCreated:
        """Create a webhook: a signed message for each ended event, delivered at least once.

        Active within a few seconds. The secret is returned only in this response.
        """
        return await webhooks.add(access.tenant, new)

    @router.get("", responses=problem_responses(401, 403, 503))
    async def list_webhooks(access: Annotated[Access, administrator]) -> Webhooks:
        """List the webhooks with their delivery states, without secrets."""
        return await webhooks.all(access.tenant)

    @router.get("/{webhook_id}", responses=problem_responses(401, 403, 404, 422, 503))
    async def get_webhook(webhook_id: WebhookId, access: Annotated[Access, administrator]) -> Webhook:
        """Get a webhook."""
        return await webhooks.get(access.tenant, webhook_id)

    @router.delete("/{webhook_id}", status_code=204, responses=problem_responses(401, 403, 404, 422, 503))
    async def delete_webhook(webhook_id: WebhookId, access: Annotated[Access, administrator]) -> Response:
        """Delete a webhook and its pending messages. Workers may deliver for a few more seconds."""
        await webhooks.remove(access.tenant, webhook_id)
        return Response(status_code=204)

    @router.post("/{webhook_id}/resume", responses=problem_responses(401, 403, 404, 422, 503))
    async def resume_webhook(webhook_id: WebhookId, access: Annotated[Access, administrator]) -> Webhook:
        """Retry pending messages immediately, and re-enable a disabled webhook.

        Events that ended while it was disabled are not delivered.
        """
        return await webhooks.resume(access.tenant, webhook_id)

    return router


def webhook_messages() -> APIRouter:
    """OpenAPI description of the webhook messages."""
    messages = APIRouter()
    headers = [
        {"name": name, "in": "header", "required": True, "description": about, "schema": {"type": "string"}}
        for name, about in SIGNED_HEADERS.items()
    ]

    @messages.post("event.ended", openapi_extra={"parameters": headers}, status_code=204)
    def event_ended(message: WebhookMessage) -> None:
        """An event ended. Respond promptly with a 2xx status. 410 disables the webhook; other statuses are retried."""

    return messages


def _resumed(webhook: KeptWebhook) -> KeptWebhook:
    # Stays failing until a delivery succeeds, so that messages are queued until then.
    since_ms = None if webhook.failing_since_ms is None else time.time() * 1000
    return webhook.model_copy(
        update={"disabled_ms": None, "next_try_ms": None, "failures": 0, "failing_since_ms": since_ms}
    )


def _check(new: NewWebhook, settings: WebhookSettings) -> None:
    errors = []
    try:
        checked_url(new.url, settings.targets)
    except TargetRefused as error:
        errors.append(InvalidField(field="url", message=str(error)))
    try:
        if new.secret is not None:
            key_of(new.secret)
    except ValueError as error:
        errors.append(InvalidField(field="secret", message=str(error)))
    if errors:
        raise invalid("invalid webhook", errors)
