"""event-ends.v1 → webhooks: tell those who asked for it that an event has ended.

A message is delivered, or kept to be tried again, before the record of its end counts as finished: at least once,
whatever dies. A receiver that fails, or is slow, holds back nobody else: what it does not take at once waits in a place
of its own, and is sent from there.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from datetime import UTC, datetime
from typing import cast

import structlog

from schemas.events import EventEnded
from schemas.records import Record
from schemas.webhooks import KeptWebhook, WaitingMessage, WebhookMessage, WebhookState
from streams.core.outcomes import Finished, Outcome
from streams.runner import Task
from streams.topology import StepName
from streams.webhook_delivery import DeliveryAttempt, WebhookDelivery

log = structlog.get_logger(__name__)


class Notify:
    """The step."""

    name = StepName.NOTIFY

    def __init__(self, courier: WebhookDelivery) -> None:
        self._courier = courier
        self._webhooks: dict[str, KeptWebhook] = {}
        self._read_s = float("-inf")
        # Whose receivers were slow: what is theirs waits, until nothing does.
        self._set_aside: set[str] = set()
        # What was delivered in a batch that must be done again because the store failed: not to be sent once more.
        self._taken: set[tuple[str, str]] = set()

    async def run(self, tasks: Sequence[Task]) -> AsyncGenerator[Sequence[Outcome], None]:
        """See ``Step.run``."""
        await self._read_webhooks()
        wanted = self._wanted([cast("EventEnded", task.message) for task in tasks])
        if wanted:
            tried = await asyncio.gather(*(self._tried(self._webhooks[name], told) for name, told in wanted.items()))
            self._taken |= {(one.webhook_id, one.message_id) for some in tried for one in some.delivered}
            kept = [one for some in tried for one in some.left]
            await self._courier.store.keep(kept)
            self._courier.counted("kept", len(kept))
            for webhook_id, some in zip(wanted, tried, strict=True):
                if some.failure is not None:
                    changed = await self._courier.failed(self._webhooks[webhook_id], some.failure)
                    if changed is not None:
                        self._webhooks[webhook_id] = changed
            self._taken.clear()
        yield [Finished()] * len(tasks)

    async def close(self, task: Task, kind: str, reason: str) -> None:
        """See ``Step.close``: a try of this step leaves nothing that the next would not do as well."""

    def give_up(self, task: Task, reason: str) -> tuple[Record, ...]:  # noqa: ARG002 - nothing follows this step
        """See ``Step.give_up``."""
        return ()

    async def _read_webhooks(self) -> None:
        if time.monotonic() - self._read_s < self._courier.settings.refresh_s:
            return
        read_s = time.monotonic()
        self._webhooks = {one.webhook_id: one for one in await self._courier.store.webhooks()}
        if self._set_aside:
            self._set_aside &= (await self._courier.store.waiting()).keys()
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
                    self._courier.counted("dropped", 1)
                elif (webhook.webhook_id, end.event_id) not in self._taken:
                    # An end that came twice in a batch is one message.
                    wanted[webhook.webhook_id].setdefault(end.event_id, told(end, webhook))
        return {webhook_id: list(messages.values()) for webhook_id, messages in wanted.items()}

    async def _tried(self, webhook: KeptWebhook, messages: Sequence[WaitingMessage]) -> DeliveryAttempt:
        if webhook.state is WebhookState.FAILING or webhook.webhook_id in self._set_aside:
            return DeliveryAttempt((), messages, None)
        tried = await self._courier.deliver(webhook, messages, patience_s=self._courier.settings.patience_s)
        if tried.left and tried.failure is None:
            self._set_aside.add(webhook.webhook_id)
        return tried


def told(end: EventEnded, webhook: KeptWebhook) -> WaitingMessage:
    """What a webhook is told of an end. An event ends once, so its id is the message's, however often it is sent."""
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
