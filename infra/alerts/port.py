"""What the rest of Freshline knows of alerts."""

from dataclasses import dataclass
from typing import Protocol

from schemas.alerts import Severity


class AlertNotSent(Exception):
    """A channel did not take an alert."""


@dataclass(frozen=True, slots=True)
class Alert:
    """News of one condition.

    Attributes:
        name: of the condition; the same as long as it lasts.
        severity: how bad it is now.
        text: what is the case, for people; never a question or a document.
        source: the process that tells.
        at_ms: epoch milliseconds.
    """

    name: str
    severity: Severity
    text: str
    source: str
    at_ms: float


class AlertChannel(Protocol):
    """A way to people."""

    @property
    def name(self) -> str:
        """What kind of way it is."""
        ...

    async def send(self, alert: Alert) -> None:
        """Hand it over.

        Raises:
            AlertNotSent: it was not taken.
        """
        ...

    async def close(self) -> None:
        """Free connections."""
        ...
