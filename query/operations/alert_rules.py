"""When an alert notification is due. Pure: measurements and times are arguments."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from schemas.alerts import Severity

CONFIRMATIONS: Final = 2
"""Consecutive evaluations with the same severity before a change of severity is notified."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Value of a condition, with its thresholds.

    Attributes:
        name: name of the condition.
        value: current value.
        warning: lowest value that is a warning.
        critical: lowest value that is critical.
        text: description of the value.
    """

    name: str
    value: float
    warning: float
    critical: float
    text: str

    @property
    def severity(self) -> Severity:
        """Severity of the value."""
        if self.value >= self.critical:
            return Severity.CRITICAL
        return Severity.WARNING if self.value >= self.warning else Severity.RESOLVED


@dataclass(frozen=True, slots=True)
class Notification:
    """A notification that is due."""

    name: str
    severity: Severity
    text: str


@dataclass(slots=True)
class _ConditionState:
    notified: Severity = Severity.RESOLVED
    notified_s: float = 0.0
    last: Severity = Severity.RESOLVED
    consecutive: int = 0


class AlertEvaluator:
    """Decides from consecutive measurements which notifications are due.

    A change of severity is notified once it is confirmed by ``CONFIRMATIONS`` consecutive evaluations. A condition that
    persists is notified again every ``repeat_s``, a resolved one once.

    Args:
        repeat_s: repeat interval.
    """

    def __init__(self, *, repeat_s: float) -> None:
        self._repeat_s = repeat_s
        self._conditions: dict[str, _ConditionState] = {}

    def evaluate(self, measurements: Sequence[Measurement], *, now_s: float) -> list[Notification]:
        """Notifications that are due now. A condition without a measurement counts as resolved."""
        measured = {measurement.name for measurement in measurements}
        resolved = [Measurement(name, 0.0, 1.0, 1.0, "resolved") for name in self._conditions.keys() - measured]
        due = (self._evaluate(measurement, now_s) for measurement in (*measurements, *resolved))
        return [notification for notification in due if notification is not None]

    def _evaluate(self, measurement: Measurement, now_s: float) -> Notification | None:
        state = self._conditions.setdefault(measurement.name, _ConditionState())
        severity = measurement.severity
        state.consecutive = state.consecutive + 1 if severity is state.last else 1
        state.last = severity
        is_change = severity is not state.notified and state.consecutive >= CONFIRMATIONS
        persists = severity is state.notified and severity is not Severity.RESOLVED
        if not is_change and not (persists and now_s - state.notified_s >= self._repeat_s):
            return None
        state.notified, state.notified_s = severity, now_s
        return Notification(measurement.name, severity, measurement.text)
