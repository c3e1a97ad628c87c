"""Tries again what webhooks did not take, for each at its own pace."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

import structlog

from infra.opensearch.port import IndexUnavailable
from schemas.webhooks import KeptWebhook
from streams.core import webhook_health
from streams.webhook_delivery import WebhookDelivery

LOOK_S: Final = 0.5
"""Pause between looks at what waits."""

BATCH: Final = 64
"""Most messages of one webhook that are tried at once."""

_MARGIN_S: Final = 5.0

log = structlog.get_logger(__name__)


class WebhookRetries:
    """One in each worker that notifies. A webhook is claimed for as long as a try can take, so one of them tries it."""

    def __init__(self, courier: WebhookDelivery, told_waiting: Callable[[int], None] = lambda _count: None) -> None:
        self._courier = courier
        self._told_waiting = told_waiting
        self._trying: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Look until cancelled."""
        try:
            while True:
                with _failure_is_logged():
                    await self.look()
                await asyncio.sleep(LOOK_S)
        finally:
            for one in self._trying.values():
                one.cancel()
            await self.settled()

    async def look(self) -> None:
        """Begin to try what is due, each beside the others: a slow receiver keeps no other waiting.

        Raises:
            IndexUnavailable: the store does not answer.
        """
        store = self._courier.store
        waiting = await store.waiting()
        self._told_waiting(sum(waiting.values()))
        if not waiting:
            return
        webhooks = {one.webhook_id: one for one in await store.webhooks()}
        now_ms = self._courier.now_ms()
        for webhook_id, count in waiting.items():
            webhook = webhooks.get(webhook_id)
            if webhook is None:  # removed while something was kept for it
                await store.remove(webhook_id)
            elif webhook.failures and webhook.disabled_ms is None and count > self._courier.settings.max_waiting:
                await self._disable(webhook, f"{count} messages waited for it")
            elif webhook_id not in self._trying and webhook_health.is_due(webhook, now_ms=now_ms):
                trying = asyncio.create_task(self._try(webhook_id), name=f"webhook-{webhook_id}")
                self._trying[webhook_id] = trying
                trying.add_done_callback(partial(self._ended, webhook_id))

    def _ended(self, webhook_id: str, _trying: asyncio.Task[None]) -> None:
        del self._trying[webhook_id]

    async def settled(self) -> None:
        """Wait until what was begun has ended."""
        await asyncio.gather(*self._trying.values(), return_exceptions=True)

    async def _try(self, webhook_id: str) -> None:
        with _failure_is_logged():
            while await self._tried_batch(webhook_id):
                pass

    async def _tried_batch(self, webhook_id: str) -> bool:
        """Whether the next one may follow at once."""
        store = self._courier.store
        claimed = await self._claimed(webhook_id)
        if claimed is None:
            return False
        batch = await store.oldest(webhook_id, BATCH)
        tried = await self._courier.deliver(claimed, batch)
        await store.forget(tried.delivered)
        if tried.failure is not None:
            await self._courier.failed(claimed, tried.failure)
            return False
        await store.change(webhook_id, webhook_health.delivered)
        if claimed.failures:
            log.info("webhook_recovered", webhook=webhook_id, tenant=claimed.tenant)
        return len(batch) == BATCH

    async def _claimed(self, webhook_id: str) -> KeptWebhook | None:
        """The webhook, if it is still due: until the claim is over, or the try, nobody else tries it."""
        now_ms = self._courier.now_ms()
        # The last request of a batch may begin as its time ends.
        longest_s = 2 * self._courier.settings.timeout_s + _MARGIN_S

        def claim(known: KeptWebhook) -> KeptWebhook | None:
            if not webhook_health.is_due(known, now_ms=now_ms):
                return None
            return known.model_copy(update={"next_try_ms": now_ms + 1_000 * longest_s})

        return await self._courier.store.change(webhook_id, claim)

    async def _disable(self, webhook: KeptWebhook, reason: str) -> None:
        log.error("webhook_disabled", webhook=webhook.webhook_id, tenant=webhook.tenant, reason=reason)
        now_ms = self._courier.now_ms()
        await self._courier.store.change(
            webhook.webhook_id, lambda known: webhook_health.disabled(known, reason, now_ms=now_ms)
        )


@contextmanager
def _failure_is_logged() -> Iterator[None]:
    """Whatever it is, the messages are kept, and the next look may do better."""
    try:
        yield
    except IndexUnavailable as error:
        log.warning("webhooks_not_read", reason=str(error))
    except Exception:
        log.exception("redelivery_failed")
