"""Port of alert channels."""

from dataclasses import dataclass
from typing import Protocol

from schemas.alerts import Severity


class AlertNotSent(Exception):
    """A channel rejected an alert or did not respond."""


@dataclass(frozen=True, slots=True)
class Alert:
    """A change of severity of one condition.

    Attributes:
        name: name of the condition; constant while it lasts.
        severity: current severity.
        text: description for people; never contains a question or a document.
        source: process that sends the alert.
        at_ms: epoch milliseconds.
    """

    name: str
    severity: Severity
    text: str
    source: str
    at_ms: float


class AlertChannel(Protocol):
    """Sends alerts to people."""

    @property
    def name(self) -> str:
        """Kind of the channel."""
        ...

    async def send(self, alert: Alert) -> None:
        """Send an alert.

        Raises:
            AlertNotSent: the channel rejected it or did not respond.
        """
        ...

    async def close(self) -> None:
        """Close connections."""
        ...
