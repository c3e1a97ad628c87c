"""Webhooks: who is told of the ends of a tenant's events, and what they are told."""

from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field, StringConstraints

from schemas.documents import EventStatus, Outcome, TenantId
from schemas.models import Message, Request

MAX_WEBHOOKS: Final = 16
"""Most webhooks of one tenant."""

WebhookId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
Secret = Annotated[str, StringConstraints(pattern=r"^whsec_[A-Za-z0-9+/]{32,88}={0,2}$")]
Outcomes = Annotated[tuple[Outcome, ...], Field(min_length=1, max_length=len(Outcome))]

SIGNED_HEADERS: Final = {
    "webhook-id": "Of the message; the same each time it is sent. A receiver drops what it has had already.",
    "webhook-timestamp": "Epoch seconds at which it was sent. A receiver refuses what is older than five minutes.",
    "webhook-signature": "`v1,` and the base64 HMAC-SHA256 of `ID.TIMESTAMP.BODY`, with the secret's bytes as key.",
}
"""Headers of a message, as Standard Webhooks names them."""


class NewWebhook(Request):
    """A wish to be told."""

    url: Annotated[str, StringConstraints(min_length=1, max_length=2_000)] = Field(
        description="Where messages are posted: https; http for loopback alone, where the installation allows it."
    )
    secret: Secret | None = Field(
        default=None,
        description="Key of the signatures, `whsec_` and 24 to 64 bytes in base64; one is made if it is left out.",
    )
    outcomes: Outcomes = Field(default=tuple(Outcome), description="Ends that are told; all if it is left out.")
    description: Annotated[str, StringConstraints(max_length=200)] = Field(default="", description="For people.")


class WebhookState(StrEnum):
    """How a webhook is doing."""

    ACTIVE = "active"
    FAILING = "failing"
    DISABLED = "disabled"


class Webhook(Message):
    """A webhook as anybody with the right to may see it."""

    webhook_id: WebhookId
    url: str
    outcomes: Outcomes
    description: str = ""
    created_ms: float = Field(description="Epoch milliseconds.")
    state: WebhookState = Field(
        description="`failing`: messages wait and are tried again; `disabled`: nothing is sent or kept until `resume`."
    )
    waiting: int = Field(default=0, description="Messages that wait to be sent again.")
    failures: int = Field(default=0, description="Tries in a row that failed.")
    failing_since_ms: float | None = None
    next_try_ms: float | None = None
    last_failure: str | None = None


class WebhookCreated(Message):
    """A new webhook with its secret, which is shown this once."""

    webhook: Webhook
    secret: Secret


class Webhooks(Message):
    """All webhooks of a tenant, oldest first."""

    webhooks: tuple[Webhook, ...]


class KeptWebhook(Message):
    """A webhook as it is kept. Its secret signs, so it cannot be a hash: this goes to no log and to no reader."""

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
        """How it is doing."""
        if self.disabled_ms is not None:
            return WebhookState.DISABLED
        return WebhookState.ACTIVE if self.failing_since_ms is None else WebhookState.FAILING

    def shown(self, waiting: int) -> Webhook:
        """As people see it, with the number of messages that wait."""
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
    """Body of a webhook's request: an event has ended, and everything that it changes can be seen."""

    type: str = Field(description="`event.` and the outcome.", examples=["event.done", "event.dead_letter"])
    timestamp: str = Field(description="When it ended, RFC 3339.")
    tenant: str
    data: EventStatus = Field(description="As `GET /v1/events/{event_id}` tells it.")


class WaitingMessage(Message):
    """A message that could not be delivered yet. Id and body are the same with every try."""

    webhook_id: WebhookId
    message_id: str
    body: str
    ended_ms: float = Field(description="Epoch milliseconds; older ones are tried first.")
