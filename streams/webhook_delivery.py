"""Delivers messages to one webhook, and records failures in its store."""

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
"""Maximum number of concurrent requests to one receiver."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DeliveryAttempt:
    """Result of a delivery attempt.

    Attributes:
        delivered: messages that the receiver has accepted.
        undelivered: messages that it has not accepted, as far as known.
        failure: why; None if only the time ran out.
    """

    delivered: Sequence[WaitingMessage]
    undelivered: Sequence[WaitingMessage]
    failure: NotDelivered | None


@dataclass(frozen=True, slots=True)
class WebhookDelivery:
    """Sends messages, for the step and for retries.

    Attributes:
        count: called with a result and a number of messages.
    """

    store: WebhookStore
    sender: Sender
    settings: WebhookSettings
    count: Callable[[str, int], None] = field(default=lambda _result, _count: None)
    now_ms: Callable[[], float] = field(default=lambda: time.time() * 1000)

    async def deliver(
        self, webhook: KeptWebhook, messages: Sequence[WaitingMessage], *, patience_s: float | None = None
    ) -> DeliveryAttempt:
        """Send messages until one fails or the time for a batch runs out.

        The first message is sent alone, so that an unavailable receiver costs one request, not many.

        Args:
            webhook: the webhook to notify.
            messages: its messages, oldest first.
            patience_s: time after which pending requests are cancelled. By default each has its own timeout, and none
                starts after one timeout has passed, which limits a batch to twice the timeout.
        """
        remaining = list(reversed(messages))
        delivered: dict[str, WaitingMessage] = {}
        failures: list[NotDelivered] = []
        until_s = time.monotonic() + self.settings.timeout_s

        async def send_next() -> None:
            message = remaining.pop()
            failure = await self.sender.send(webhook, message)
            if failure is None:
                delivered[message.message_id] = message
            else:
                failures.append(failure)

        async def send_on() -> None:
            while remaining and not failures and time.monotonic() < until_s:
                await send_next()

        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                if remaining:
                    await send_next()
                await asyncio.gather(*(send_on() for _ in range(PARALLEL)))
        self.count("delivered", len(delivered))
        self.count("failed", len(failures))
        undelivered = [one for one in messages if one.message_id not in delivered]
        return DeliveryAttempt(tuple(delivered.values()), undelivered, failures[0] if failures else None)

    async def record_failure(self, webhook: KeptWebhook, failure: NotDelivered) -> KeptWebhook | None:
        """Record a failure and the time of the next attempt; None if the webhook was removed in the meantime.

        Raises:
            IndexUnavailable: the store does not respond.
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
                give_up_ms=1_000 * settings.disable_after_s,
                is_gone=failure.is_gone,
            )

        changed = await self.store.change(webhook.webhook_id, change)
        if changed is not None:
            fields = {"webhook": changed.webhook_id, "tenant": changed.tenant, "reason": failure.reason}
            if changed.state is WebhookState.DISABLED:
                _log.error("webhook_disabled", **fields)
            else:
                _log.warning("webhook_failing", failures=changed.failures, next_try_ms=changed.next_try_ms, **fields)
        return changed
