"""Receivers of webhooks, and the store of waiting messages."""

import json
from typing import TYPE_CHECKING

from faults import Faults

from infra.opensearch.port import IndexUnavailable
from infra.settings import WebhookSettings
from infra.webhooks.memory import MemoryWebhooks
from infra.webhooks.port import NotDelivered
from schemas.documents import Outcome
from schemas.positions import Position
from schemas.webhooks import KeptWebhook
from streams.webhook_delivery import WebhookDelivery

if TYPE_CHECKING:
    from world import World

SETTINGS = WebhookSettings(refresh_s=0, retry_first_s=0.5, retry_max_s=5)


class Webhooks(MemoryWebhooks):
    """One webhook per tenant, in a store that may fail."""

    def __init__(self, faults: Faults, tenants: tuple[str, ...]) -> None:
        super().__init__()
        self._faults = faults
        for number, tenant in enumerate(tenants):
            webhook = KeptWebhook(
                webhook_id=f"{number:016x}",
                tenant=tenant,
                url="https://example.com",
                secret="whsec_" + "a" * 32,
                outcomes=tuple(Outcome),
                created_ms=0,
            )
            self._webhooks[webhook.webhook_id] = webhook

    async def change(self, webhook_id, change):
        await self._faults.before(IndexUnavailable)
        changed = await super().change(webhook_id, change)
        await self._faults.after(IndexUnavailable)
        return changed

    async def webhooks(self):
        await self._faults.before(IndexUnavailable)
        return await super().webhooks()

    async def keep(self, messages):
        await self._faults.before(IndexUnavailable)
        await super().keep(messages)
        await self._faults.after(IndexUnavailable)

    async def forget(self, messages):
        await self._faults.before(IndexUnavailable)
        await super().forget(messages)
        await self._faults.after(IndexUnavailable)


class Receivers:
    """See ``Sender``. Deliveries often fail, and a response may be lost although the message was received."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.received: set[tuple[str, str]] = set()

    async def send(self, webhook, message):
        world = self._world
        await world.faults.before()
        if not world.faults.calm and world.rng.random() < 0.3:
            return NotDelivered("the receiver responded with 500")
        body = json.loads(message.body)
        assert (body["tenant"], body["data"]["event_id"]) == (webhook.tenant, message.message_id)
        self.received.add((webhook.tenant, message.message_id))
        position = Position.parse(body["data"]["position"])
        applied = await world.cache.positions(webhook.tenant)
        world.observed.completion_reported(message.message_id, position, applied)
        await world.faults.after()
        return NotDelivered("no answer") if not world.faults.calm and world.rng.random() < 0.1 else None


def webhook_delivery(world: "World") -> WebhookDelivery:
    """The webhook delivery of a worker."""
    return WebhookDelivery(world.webhooks, world.receivers, SETTINGS, now_ms=world.now_ms)
