"""Ports of the webhook store and the webhook sender."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from schemas.webhooks import KeptWebhook, WaitingMessage


class WebhookStore(Protocol):
    """Webhooks and their waiting messages. Methods may raise ``IndexUnavailable``."""

    async def add(self, webhook: KeptWebhook) -> None:
        """Store a new webhook. After the call, ``webhooks`` includes it in every process."""
        ...

    async def change(self, webhook_id: str, change: Callable[[KeptWebhook], KeptWebhook | None]) -> KeptWebhook | None:
        """Replace a webhook by ``change(webhook)``, and return the new one.

        None if the webhook does not exist, or ``change`` returns None to keep it. Concurrent changes are not lost:
        ``change`` is called again after a conflict.
        """
        ...

    async def remove(self, webhook_id: str) -> None:
        """Delete a webhook and its waiting messages."""
        ...

    async def webhooks(self) -> Sequence[KeptWebhook]:
        """All webhooks, oldest first."""
        ...

    async def keep(self, messages: Sequence[WaitingMessage]) -> None:
        """Store messages for retries. A message that exists already is unchanged."""
        ...

    async def waiting(self) -> Mapping[str, int]:
        """Webhook id → number of waiting messages, if any. Messages stored within the last second may be missing."""
        ...

    async def oldest(self, webhook_id: str, limit: int) -> Sequence[WaitingMessage]:
        """The oldest waiting messages of a webhook. Messages stored within the last second may be missing."""
        ...

    async def forget(self, messages: Sequence[WaitingMessage]) -> None:
        """Delete delivered messages. After the call, ``oldest`` does not include them."""
        ...


@dataclass(frozen=True, slots=True)
class NotDelivered:
    """A receiver did not accept a message.

    Attributes:
        reason: description for people, without the URL and without content of the response.
        is_gone: whether the receiver responded with 410, so that no further messages are to be sent.
    """

    reason: str
    is_gone: bool = False


class Sender(Protocol):
    """Sends signed messages."""

    async def send(self, webhook: KeptWebhook, message: WaitingMessage) -> NotDelivered | None:
        """Send a message once; None if the receiver accepted it. Does not raise, and ends within a timeout."""
        ...
