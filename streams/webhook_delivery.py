"""Delivers messages to one webhook, and remembers in its store how that went."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import structlog

from infra.settings import WebhookSettings
from infra.webhooks.port import NotDelivered, Sender, WebhookStore
from schemas.webhooks import KeptWebhook, WaitingMessage, WebhookState
from streams.core import webhook_health

PARALLEL: Final = 8
"""Requests to one receiver at a time."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DeliveryAttempt:
    """How a batch for one webhook went.

    Attributes:
        delivered: what the receiver has taken.
        left: what it has not, as far as it is known.
        failure: why; None where only the time was over.
    """

    delivered: Sequence[WaitingMessage]
    left: Sequence[WaitingMessage]
    failure: NotDelivered | None


@dataclass(frozen=True, slots=True)
class WebhookDelivery:
    """Works for the step and for those who try again."""

    store: WebhookStore
    sender: Sender
    settings: WebhookSettings
    counted: Callable[[str, int], None] = field(default=lambda _result, _count: None)
    now_ms: Callable[[], float] = field(default=lambda: time.time() * 1000)

    async def deliver(
        self, webhook: KeptWebhook, messages: Sequence[WaitingMessage], *, patience_s: float | None = None
    ) -> DeliveryAttempt:
        """Send messages until one fails or the time for a batch is over.

        The first goes alone, so that a receiver that is away costs one request, not many.

        Args:
            webhook: whose receiver is told.
            messages: what it is told, oldest first.
            patience_s: after so long requests under way are given up, too. By default they have their own limit, and
                none begins after it has passed once: twice as long in all.
        """
        left = list(reversed(messages))
        delivered: dict[str, WaitingMessage] = {}
        failures: list[NotDelivered] = []
        until_s = time.monotonic() + self.settings.timeout_s

        async def send_next() -> None:
            message = left.pop()
            failure = await self.sender.send(webhook, message)
            if failure is None:
                delivered[message.message_id] = message
            else:
                failures.append(failure)

        async def send_on() -> None:
            while left and not failures and time.monotonic() < until_s:
                await send_next()

        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                if left:
                    await send_next()
                await asyncio.gather(*(send_on() for _ in range(PARALLEL)))
        self.counted("delivered", len(delivered))
        self.counted("failed", len(failures))
        untaken = [one for one in messages if one.message_id not in delivered]
        return DeliveryAttempt(tuple(delivered.values()), untaken, failures[0] if failures else None)

    async def failed(self, webhook: KeptWebhook, failure: NotDelivered) -> KeptWebhook | None:
        """Note that it failed, and when it is tried again; None where it was removed meanwhile.

        Raises:
            IndexUnavailable: the store does not answer.
        """
        jitter = random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        settings, now_ms = self.settings, self.now_ms()

        def change(known: KeptWebhook) -> KeptWebhook:
            first_ms, longest_ms = 1_000 * settings.retry_first_s, 1_000 * settings.retry_max_s
            pause_ms = webhook_health.pause_ms(
                known.failures + 1, first_ms=first_ms, longest_ms=longest_ms, jitter=jitter
            )
            return webhook_health.failed(
                known,
                failure.reason,
                now_ms=now_ms,
                pause_ms=pause_ms,
                give_up_ms=1_000 * settings.give_up_s,
                is_gone=failure.is_gone,
            )

        changed = await self.store.change(webhook.webhook_id, change)
        if changed is not None:
            told = {"webhook": changed.webhook_id, "tenant": changed.tenant, "reason": failure.reason}
            if changed.state is WebhookState.DISABLED:
                log.error("webhook_disabled", **told)
            else:
                log.warning("webhook_failing", failures=changed.failures, next_try_ms=changed.next_try_ms, **told)
        return changed
