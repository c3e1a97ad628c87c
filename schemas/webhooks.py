"""Webhooks: notifications of event outcomes."""

from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field, StringConstraints

from schemas.documents import EventStatus, Outcome, TenantId
from schemas.models import Message, Request

MAX_WEBHOOKS: Final = 16
"""Maximum number of webhooks per tenant."""

WebhookId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
Secret = Annotated[str, StringConstraints(pattern=r"^whsec_[A-Za-z0-9+/]{32,88}={0,2}$")]
Outcomes = Annotated[tuple[Outcome, ...], Field(min_length=1, max_length=len(Outcome))]

SIGNED_HEADERS: Final = {
    "webhook-id": "Id of the message, equal for all attempts. Receivers use it to discard duplicates.",
    "webhook-timestamp": "Epoch seconds of the attempt. Receivers reject messages older than five minutes.",
    "webhook-signature": "`v1,` and the base64 HMAC-SHA256 of `ID.TIMESTAMP.BODY`, with the secret's bytes as key.",
}
"""Headers of a message, as defined by Standard Webhooks."""


class NewWebhook(Request):
    """Request to create a webhook."""

    url: Annotated[str, StringConstraints(min_length=1, max_length=2_000)] = Field(
        description="Target URL of the messages: https, or http to loopback if the installation allows it."
    )
    secret: Secret | None = Field(
        default=None,
        description="Signing key: `whsec_` and 24 to 64 bytes in base64. Default: generated.",
    )
    outcomes: Outcomes = Field(default=tuple(Outcome), description="Outcomes to send. Default: all.")
    description: Annotated[str, StringConstraints(max_length=200)] = Field(default="", description="Free text.")


class WebhookState(StrEnum):
    """Delivery state of a webhook."""

    ACTIVE = "active"
    FAILING = "failing"
    DISABLED = "disabled"


class Webhook(Message):
    """A webhook without its secret."""

    webhook_id: WebhookId
    url: str
    outcomes: Outcomes
    description: str = ""
    created_ms: float = Field(description="Epoch milliseconds.")
    state: WebhookState = Field(
        description="`failing`: messages are queued and retried; `disabled`: nothing is sent or queued until `resume`."
    )
    waiting: int = Field(default=0, description="Number of messages that wait for a retry.")
    failures: int = Field(default=0, description="Number of consecutive failed attempts.")
    failing_since_ms: float | None = None
    next_try_ms: float | None = None
    last_failure: str | None = None


class WebhookCreated(Message):
    """A new webhook with its secret, which is returned only once."""

    webhook: Webhook
    secret: Secret


class Webhooks(Message):
    """All webhooks of a tenant, oldest first."""

    webhooks: tuple[Webhook, ...]


class KeptWebhook(Message):
    """A stored webhook. Its secret signs messages, so it cannot be hashed; it is never logged or returned."""

    webhook_id: WebhookId
    tenant: TenantId
    url: str
    secret: str = Field(repr=False)
    outcomes: Outcomes
    description: str = ""
    created_ms: float
    failures: int = 0
    failing_since_ms: float | None = None
    next_try_ms: float | None = None
    last_failure: str | None = None
    disabled_ms: float | None = None

    @property
    def state(self) -> WebhookState:
        """Delivery state."""
        if self.disabled_ms is not None:
            return WebhookState.DISABLED
        return WebhookState.ACTIVE if self.failing_since_ms is None else WebhookState.FAILING

    def shown(self, waiting: int) -> Webhook:
        """The webhook without its secret, with the number of waiting messages."""
        return Webhook(
            webhook_id=self.webhook_id,
            url=self.url,
            outcomes=self.outcomes,
            description=self.description,
            created_ms=self.created_ms,
            state=self.state,
            waiting=waiting,
            failures=self.failures,
            failing_since_ms=self.failing_since_ms,
            next_try_ms=self.next_try_ms,
            last_failure=self.last_failure,
        )


class WebhookMessage(Message):
    """Body of a webhook request: an event has ended, and its changes are visible in answers."""

    type: str = Field(
        description="`event.` and the outcome of the event.", examples=["event.done", "event.dead_letter"]
    )
    timestamp: str = Field(description="Time at which the event ended, RFC 3339.")
    tenant: str
    data: EventStatus = Field(description="As returned by `GET /v1/events/{event_id}`.")


class WaitingMessage(Message):
    """A message that waits for a retry. Id and body are equal for all attempts."""

    webhook_id: WebhookId
    message_id: str
    body: str
    ended_ms: float = Field(description="Epoch milliseconds. Older messages are retried first.")
