"""When a reading is worth waking somebody, and when it was said already. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from schemas.alerts import Severity

LOOKS: Final = 2
"""Looks in a row that must agree before anything is said: one bad moment is none."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A figure and what it may be.

    Attributes:
        name: of the condition.
        value: now.
        warning: from here on it is a warning.
        critical: from here on it is critical.
        text: what the figure says, for people.
    """

    name: str
    value: float
    warning: float
    critical: float
    text: str

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        if self.value >= self.critical:
            return Severity.CRITICAL
        return Severity.WARNING if self.value >= self.warning else Severity.RESOLVED


@dataclass(frozen=True, slots=True)
class News:
    """Something to tell."""

    name: str
    severity: Severity
    text: str


@dataclass(slots=True)
class _Condition:
    told: Severity = Severity.RESOLVED
    told_s: float = 0.0
    seen: Severity = Severity.RESOLVED
    looks: int = field(default=0)


class Alarms:
    """Remembers what was told of each condition.

    A condition is told of when its severity has changed for ``LOOKS`` looks in a row, and again every ``repeat_s``
    while it lasts. One that is over is told of once.

    Args:
        repeat_s: see above.
    """

    def __init__(self, *, repeat_s: float) -> None:
        self._repeat_s = repeat_s
        self._conditions: dict[str, _Condition] = {}

    def judge(self, readings: Sequence[Reading], *, now_s: float) -> list[News]:
        """What is to be told now. A condition that is not read any more counts as over."""
        by_name: Mapping[str, Reading] = {reading.name: reading for reading in readings}
        over = [Reading(name, 0.0, 1.0, 1.0, "is over") for name in self._conditions.keys() - by_name.keys()]
        return [news for reading in (*readings, *over) if (news := self._judged(reading, now_s)) is not None]

    def _judged(self, reading: Reading, now_s: float) -> News | None:
        condition = self._conditions.setdefault(reading.name, _Condition())
        severity = reading.severity
        condition.looks = condition.looks + 1 if severity is condition.seen else 1
        condition.seen = severity
        is_change = severity is not condition.told and condition.looks >= LOOKS
        lasts = severity is condition.told and severity is not Severity.RESOLVED
        if not is_change and not (lasts and now_s - condition.told_s >= self._repeat_s):
            return None
        condition.told, condition.told_s = severity, now_s
        return News(reading.name, severity, reading.text)
