"""What is asked of the store of webhooks and of whoever sends their messages."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from schemas.webhooks import KeptWebhook, WaitingMessage


class WebhookStore(Protocol):
    """Webhooks, and the messages that wait. Its failures are ``IndexUnavailable``."""

    async def add(self, webhook: KeptWebhook) -> None:
        """Keep a new webhook; when this returns, ``webhooks`` of every process has it."""
        ...

    async def change(self, webhook_id: str, change: Callable[[KeptWebhook], KeptWebhook | None]) -> KeptWebhook | None:
        """Put what ``change`` makes of a webhook in its place, and return it.

        None where there is no such webhook, or ``change`` leaves it as it is by giving None. ``change`` may be called
        several times: nothing that another process wrote meanwhile is lost.
        """
        ...

    async def remove(self, webhook_id: str) -> None:
        """Forget a webhook and the messages that wait for it."""
        ...

    async def webhooks(self) -> Sequence[KeptWebhook]:
        """All webhooks, oldest first."""
        ...

    async def keep(self, messages: Sequence[WaitingMessage]) -> None:
        """Keep messages to be sent again; one that is there already stays as it is."""
        ...

    async def waiting(self) -> Mapping[str, int]:
        """Webhook id → messages that wait for it, where there are any; those kept in the last second may be missing."""
        ...

    async def oldest(self, webhook_id: str, limit: int) -> Sequence[WaitingMessage]:
        """The first of a webhook's messages by time, with the same reservation."""
        ...

    async def forget(self, messages: Sequence[WaitingMessage]) -> None:
        """Messages that are delivered; ``oldest`` has none of them any more when this returns."""
        ...


@dataclass(frozen=True, slots=True)
class NotDelivered:
    """A receiver did not take a message.

    Attributes:
        reason: for people; holds neither the URL nor anything that the receiver said beside its status.
        is_gone: the receiver says that it wants nothing any more.
    """

    reason: str
    is_gone: bool = False


class Sender(Protocol):
    """Posts signed messages."""

    async def send(self, webhook: KeptWebhook, message: WaitingMessage) -> NotDelivered | None:
        """Post a message, once; None when the receiver has taken it. Never raises, and ends within its time limit."""
        ...
