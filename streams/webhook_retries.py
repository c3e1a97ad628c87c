"""Retries messages that receivers did not accept, for each webhook at its own pace."""

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

POLL_S: Final = 0.5
"""Interval at which waiting messages are read."""

BATCH: Final = 64
"""Maximum number of messages of one webhook in an attempt."""

_MARGIN_S: Final = 5.0

_log = structlog.get_logger(__name__)


class WebhookRetries:
    """Retries of one worker.

    A webhook is claimed for the longest duration of an attempt, so only one worker retries it.

    Args:
        delivery: sends messages.
        on_waiting: called with the number of all waiting messages.
    """

    def __init__(self, delivery: WebhookDelivery, on_waiting: Callable[[int], None] = lambda _count: None) -> None:
        self._delivery = delivery
        self._on_waiting = on_waiting
        self._retries: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Retry until cancelled."""
        try:
            while True:
                with _log_failure():
                    await self.start_due()
                await asyncio.sleep(POLL_S)
        finally:
            for task in self._retries.values():
                task.cancel()
            await self.wait()

    async def start_due(self) -> None:
        """Start the retries that are due. They are concurrent, so a slow receiver does not delay others.

        Raises:
            IndexUnavailable: the store does not respond.
        """
        store = self._delivery.store
        waiting = await store.waiting()
        self._on_waiting(sum(waiting.values()))
        if not waiting:
            return
        webhooks = {one.webhook_id: one for one in await store.webhooks()}
        now_ms = self._delivery.now_ms()
        for webhook_id, count in waiting.items():
            webhook = webhooks.get(webhook_id)
            if webhook is None:  # removed while messages were waiting for it
                await store.remove(webhook_id)
            elif webhook.failures and webhook.disabled_ms is None and count > self._delivery.settings.max_pending:
                await self._disable(webhook, f"{count} messages were waiting")
            elif webhook_id not in self._retries and webhook_health.is_due(webhook, now_ms=now_ms):
                retry = asyncio.create_task(self._retry(webhook_id), name=f"webhook-{webhook_id}")
                self._retries[webhook_id] = retry
                retry.add_done_callback(partial(self._ended, webhook_id))

    def _ended(self, webhook_id: str, _task: asyncio.Task[None]) -> None:
        del self._retries[webhook_id]

    async def wait(self) -> None:
        """Wait until all retries have ended."""
        await asyncio.gather(*self._retries.values(), return_exceptions=True)

    async def _retry(self, webhook_id: str) -> None:
        with _log_failure():
            while await self._retry_batch(webhook_id):
                pass

    async def _retry_batch(self, webhook_id: str) -> bool:
        """Retry one batch. True if the next one may follow immediately."""
        store = self._delivery.store
        claimed = await self._claim(webhook_id)
        if claimed is None:
            return False
        batch = await store.oldest(webhook_id, BATCH)
        attempt = await self._delivery.deliver(claimed, batch)
        await store.forget(attempt.delivered)
        if attempt.failure is not None:
            await self._delivery.record_failure(claimed, attempt.failure)
            return False
        await store.change(webhook_id, webhook_health.delivered)
        if claimed.failures:
            _log.info("webhook_recovered", webhook=webhook_id, tenant=claimed.tenant)
        return len(batch) == BATCH

    async def _claim(self, webhook_id: str) -> KeptWebhook | None:
        """Claim the webhook if it is due. No other worker retries it until the claim expires or the attempt ends."""
        now_ms = self._delivery.now_ms()
        # The last request of a batch may start just before the time runs out.
        longest_s = 2 * self._delivery.settings.timeout_s + _MARGIN_S

        def claim(known: KeptWebhook) -> KeptWebhook | None:
            if not webhook_health.is_due(known, now_ms=now_ms):
                return None
            return known.model_copy(update={"next_try_ms": now_ms + 1_000 * longest_s})

        return await self._delivery.store.change(webhook_id, claim)

    async def _disable(self, webhook: KeptWebhook, reason: str) -> None:
        _log.error("webhook_disabled", webhook=webhook.webhook_id, tenant=webhook.tenant, reason=reason)
        now_ms = self._delivery.now_ms()
        await self._delivery.store.change(
            webhook.webhook_id, lambda known: webhook_health.disabled(known, reason, now_ms=now_ms)
        )


@contextmanager
def _log_failure() -> Iterator[None]:
    """Log failures instead of raising them."""
    try:
        yield
    except IndexUnavailable as error:
        _log.warning("webhooks_not_read", reason=str(error))
    except Exception:  # noqa: BLE001 - logged; the messages are kept, and the next round may succeed
        _log.exception("webhook_retry_failed")
