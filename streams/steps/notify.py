"""event-ends.v1 → webhooks: notify subscribers that events have finished.

A message is delivered, or stored for a retry, before its record is acknowledged. So delivery is at least once, also
after a crash. A failing or slow receiver does not delay others: messages that it does not accept immediately are stored
and sent separately.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from datetime import UTC, datetime
from typing import cast

import structlog
from typing_extensions import override

from schemas.events import EventEnded
from schemas.records import Record
from schemas.webhooks import KeptWebhook, WaitingMessage, WebhookMessage, WebhookState
from streams.core.outcomes import Finished, Outcome
from streams.runner import Step, Task
from streams.topology import StepName
from streams.webhook_delivery import DeliveryAttempt, WebhookDelivery

_log = structlog.get_logger(__name__)


class Notify(Step):
    """The notify step."""

    name = StepName.NOTIFY

    def __init__(self, delivery: WebhookDelivery) -> None:
        self._delivery = delivery
        self._webhooks: dict[str, KeptWebhook] = {}
        self._read_s = float("-inf")
        # Webhooks with slow receivers: their messages are stored until none waits.
        self._deferred: set[str] = set()
        # Deliveries of a batch that has to be repeated because the store failed; they are not sent again.
        self._delivered: set[tuple[str, str]] = set()

    @override
    async def run(self, tasks: Sequence[Task]) -> AsyncGenerator[Sequence[Outcome], None]:
        await self._read_webhooks()
        wanted = self._wanted([cast("EventEnded", task.message) for task in tasks])
        if wanted:
            attempts = await asyncio.gather(
                *(self._attempt(self._webhooks[name], messages) for name, messages in wanted.items())
            )
            self._delivered |= {(one.webhook_id, one.message_id) for attempt in attempts for one in attempt.delivered}
            kept = [one for attempt in attempts for one in attempt.undelivered]
            await self._delivery.store.keep(kept)
            self._delivery.count("kept", len(kept))
            for webhook_id, attempt in zip(wanted, attempts, strict=True):
                if attempt.failure is not None:
                    changed = await self._delivery.record_failure(self._webhooks[webhook_id], attempt.failure)
                    if changed is not None:
                        self._webhooks[webhook_id] = changed
            self._delivered.clear()
        yield [Finished()] * len(tasks)

    @override
    async def close(self, task: Task, kind: str, reason: str) -> None:
        pass  # attempts of this step leave nothing to undo

    @override
    def give_up(self, task: Task, reason: str) -> tuple[Record, ...]:
        return ()

    async def _read_webhooks(self) -> None:
        if time.monotonic() - self._read_s < self._delivery.settings.refresh_s:
            return
        read_s = time.monotonic()
        self._webhooks = {one.webhook_id: one for one in await self._delivery.store.webhooks()}
        if self._deferred:
            self._deferred &= (await self._delivery.store.waiting()).keys()
        self._read_s = read_s

    def _wanted(self, ends: Sequence[EventEnded]) -> dict[str, list[WaitingMessage]]:
        by_tenant: dict[str, list[KeptWebhook]] = defaultdict(list)
        for webhook in self._webhooks.values():
            by_tenant[webhook.tenant].append(webhook)
        wanted: dict[str, dict[str, WaitingMessage]] = defaultdict(dict)
        for end in ends:
            for webhook in by_tenant[end.tenant]:
                if end.status.outcome not in webhook.outcomes:
                    continue
                if webhook.state is WebhookState.DISABLED:
                    self._delivery.count("dropped", 1)
                elif (webhook.webhook_id, end.event_id) not in self._delivered:
                    # A duplicate in a batch is one message.
                    wanted[webhook.webhook_id].setdefault(end.event_id, webhook_message(end, webhook))
        return {webhook_id: list(messages.values()) for webhook_id, messages in wanted.items()}

    async def _attempt(self, webhook: KeptWebhook, messages: Sequence[WaitingMessage]) -> DeliveryAttempt:
        if webhook.state is WebhookState.FAILING or webhook.webhook_id in self._deferred:
            return DeliveryAttempt((), messages, None)
        attempt = await self._delivery.deliver(webhook, messages, patience_s=self._delivery.settings.receiver_wait_s)
        if attempt.undelivered and attempt.failure is None:
            self._deferred.add(webhook.webhook_id)
        return attempt


def webhook_message(end: EventEnded, webhook: KeptWebhook) -> WaitingMessage:
    """The message about a finished event. Its id is that of the event, so repeated deliveries have the same id."""
    status = end.status
    ended_ms = status.accepted_ms + max(status.stages_ms.values(), default=0.0)
    message = WebhookMessage(
        type=f"event.{status.outcome}",
        timestamp=datetime.fromtimestamp(ended_ms / 1000, UTC).isoformat(timespec="milliseconds"),
        tenant=end.tenant,
        data=status,
    )
    return WaitingMessage(
        webhook_id=webhook.webhook_id, message_id=end.event_id, body=message.model_dump_json(), ended_ms=ended_ms
    )
