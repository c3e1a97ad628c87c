"""Alerts: how severe a condition is."""

from enum import StrEnum


class Severity(StrEnum):
    """How bad it is."""

    RESOLVED = "resolved"
    WARNING = "warning"
    CRITICAL = "critical"
