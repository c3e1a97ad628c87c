"""In-memory webhook store, for tests and simulation."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from typing_extensions import override

from infra.opensearch.port import IndexUnavailable
from infra.webhooks.port import WebhookStore
from schemas.webhooks import KeptWebhook, WaitingMessage


class MemoryWebhooks(WebhookStore):
    """In-memory webhook store.

    Attributes:
        available: while False, every method raises ``IndexUnavailable``.
    """

    def __init__(self) -> None:
        self.available = True
        self._webhooks: dict[str, KeptWebhook] = {}
        self._waiting: dict[tuple[str, str], WaitingMessage] = {}

    @override
    async def add(self, webhook: KeptWebhook) -> None:
        self._check_available()
        self._webhooks[webhook.webhook_id] = webhook

    @override
    async def change(self, webhook_id: str, change: Callable[[KeptWebhook], KeptWebhook | None]) -> KeptWebhook | None:
        self._check_available()
        if webhook_id not in self._webhooks or (changed := change(self._webhooks[webhook_id])) is None:
            return None
        self._webhooks[webhook_id] = changed
        return changed

    @override
    async def remove(self, webhook_id: str) -> None:
        self._check_available()
        self._webhooks.pop(webhook_id, None)
        self._waiting = {key: one for key, one in self._waiting.items() if key[0] != webhook_id}

    @override
    async def webhooks(self) -> Sequence[KeptWebhook]:
        self._check_available()
        return sorted(self._webhooks.values(), key=lambda one: (one.created_ms, one.webhook_id))

    @override
    async def keep(self, messages: Sequence[WaitingMessage]) -> None:
        self._check_available()
        for one in messages:
            self._waiting.setdefault((one.webhook_id, one.message_id), one)

    @override
    async def waiting(self) -> Mapping[str, int]:
        self._check_available()
        return Counter(webhook_id for webhook_id, _ in self._waiting)

    @override
    async def oldest(self, webhook_id: str, limit: int) -> Sequence[WaitingMessage]:
        self._check_available()
        own = [one for one in self._waiting.values() if one.webhook_id == webhook_id]
        return sorted(own, key=lambda one: (one.ended_ms, one.message_id))[:limit]

    @override
    async def forget(self, messages: Sequence[WaitingMessage]) -> None:
        self._check_available()
        for one in messages:
            self._waiting.pop((one.webhook_id, one.message_id), None)

    def _check_available(self) -> None:
        if not self.available:
            raise IndexUnavailable("the store was made unavailable")
