"""Watching the process's own figures, and telling people when they are bad."""

import asyncio
import time
from collections.abc import Sequence
from typing import Final

import structlog

from infra.alerts.port import Alert, AlertChannel, AlertNotSent
from infra.settings import AlertSettings
from query.operations.alert_rules import Alarms, Reading
from query.operations.endpoints import Operations
from query.operations.health import PartState
from query.telemetry.audit_verdicts import Verdict
from query.telemetry.metrics import QueryMetrics

_WINDOW_S: Final = 60
_FEWEST: Final = 20
"""Requests of a window below which its shares and percentiles say nothing."""
_TRIES: Final = 3
_PAUSE_S: Final = 1.0

_log = structlog.get_logger(__name__)


class Alerting:
    """Looks again and again, and sends what is news through every channel.

    Args:
        operations: whose figures.
        channels: ways to people.
        settings: thresholds and times.
        metrics: where alerts are counted.
        source: name of this process.
    """

    def __init__(
        self,
        operations: Operations,
        channels: Sequence[AlertChannel],
        settings: AlertSettings,
        *,
        metrics: QueryMetrics,
        source: str,
    ) -> None:
        self._operations = operations
        self._channels = channels
        self._settings = settings
        self._metrics = metrics
        self._source = source
        self._alarms = Alarms(repeat_s=settings.repeat_s)

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(self._settings.interval_s)
            try:
                await self.look()
            except Exception:  # noqa: BLE001 - as the next line says
                _log.exception("alerting_failed")  # the next look may do better, and nobody else would tell

    async def look(self) -> None:
        """Look once, and send what is news."""
        news = self._alarms.judge(await self._readings(), now_s=time.monotonic())
        alerts = [Alert(one.name, one.severity, one.text, self._source, time.time() * 1_000) for one in news]
        await asyncio.gather(*(self._send(channel, alert) for alert in alerts for channel in self._channels))

    async def _readings(self) -> list[Reading]:
        told, health = self._settings, self._operations.health()
        window = self._operations.window(_WINDOW_S)
        readings = [_of_part(name, state) for name, state in (await self._operations.states()).items()]
        limit = health.memory_limit_bytes
        if limit is not None:
            share = health.memory_bytes / limit
            readings.append(Reading("memory", share, 0.9, 1.0, f"{share:.0%} of its limit are in use"))
        stale = window.audited[Verdict.VIOLATION]
        text = f"{stale} audited answers of the last minute lacked changes that they claimed"
        readings.append(Reading("stale answers", stale, 1, 1, text))
        if window.requests >= _FEWEST:
            errors, refused, p99_ms = window.error_share, window.unavailable_share, window.times.p99_ms
            readings += [
                Reading(
                    "errors",
                    errors,
                    told.errors_warning_share,
                    told.errors_critical_share,
                    f"{errors:.1%} of the last minute's requests failed",
                ),
                Reading(
                    "refusals",
                    refused,
                    told.refusals_warning_share,
                    told.refusals_critical_share,
                    f"{refused:.1%} of the last minute's requests were refused",
                ),
                Reading(
                    "latency",
                    p99_ms,
                    told.p99_warning_ms,
                    told.p99_critical_ms,
                    f"p99 of the last minute is {p99_ms:.0f} ms",
                ),
            ]
        return readings

    async def _send(self, channel: AlertChannel, alert: Alert) -> None:
        for attempt in range(1, _TRIES + 1):
            try:
                await channel.send(alert)
            except AlertNotSent as error:
                _log.warning("alert_not_sent", alert=alert.name, attempt=attempt, reason=str(error))
                if attempt < _TRIES:
                    await asyncio.sleep(_PAUSE_S * attempt)
            else:
                self._metrics.alerts.labels(channel.name, alert.severity).inc()
                return
        self._metrics.alerts.labels(channel.name, "not_sent").inc()


def _of_part(name: str, state: PartState) -> Reading:
    """A needed part that is out is critical, another one a warning."""
    critical = 1.0 if state.needed else 2.0
    return Reading(f"part {name}", float(state.fault is not None), 1.0, critical, state.fault or "is back")
