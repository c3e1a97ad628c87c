"""Alerting on the statistics of this process."""

import asyncio
import time
from collections.abc import Sequence
from typing import Final

import structlog

from infra.alerts.port import Alert, AlertChannel, AlertNotSent
from infra.settings import AlertSettings
from query.operations.alert_rules import AlertEvaluator, Measurement
from query.operations.endpoints import Operations
from query.operations.health import DependencyState
from query.telemetry.audit_verdicts import AuditVerdict
from query.telemetry.metrics import QueryMetrics

_WINDOW_S: Final = 60
_INTERVAL_S: Final = 10.0
"""Evaluation interval. Two consecutive evaluations must agree before a notification."""
_MIN_REQUESTS: Final = 20
"""Rates and percentiles of a window with fewer requests are not evaluated."""
_ATTEMPTS: Final = 3
_BACKOFF_S: Final = 1.0

_log = structlog.get_logger(__name__)


class Alerting:
    """Evaluates alert conditions periodically and sends notifications through every channel.

    Args:
        operations: statistics and dependency states.
        channels: notification channels.
        settings: thresholds and intervals.
        metrics: counts alerts.
        source: name of this process, for the recipients.
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
        self._evaluator = AlertEvaluator(repeat_s=settings.repeat_s)

    async def run(self) -> None:
        """Evaluate until cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL_S)
            try:
                await self.evaluate()
            except Exception:  # noqa: BLE001 - logged; alerting must not end, and the next evaluation may succeed
                _log.exception("alert_evaluation_failed")

    async def evaluate(self) -> None:
        """Evaluate once and send the notifications that are due."""
        due = self._evaluator.evaluate(await self._measurements(), now_s=time.monotonic())
        alerts = [Alert(item.name, item.severity, item.text, self._source, time.time() * 1_000) for item in due]
        await asyncio.gather(*(self._send(channel, alert) for alert in alerts for channel in self._channels))

    async def _measurements(self) -> list[Measurement]:
        thresholds, health = self._settings, self._operations.health()
        window = self._operations.window(_WINDOW_S)
        states = await self._operations.dependency_states()
        measurements = [_dependency(name, state) for name, state in states.items()]
        limit_bytes = health.memory_limit_bytes
        if limit_bytes is not None:
            usage = health.memory_bytes / limit_bytes
            measurements.append(Measurement("memory", usage, 0.9, 1.0, f"memory usage is {usage:.0%} of the limit"))
        violations = window.audits[AuditVerdict.VIOLATION]
        text = f"{violations} audited answers of the last minute lacked changes that their positions cover"
        measurements.append(Measurement("stale answers", violations, 1, 1, text))
        if window.requests >= _MIN_REQUESTS:
            errors, rejections, p99_ms = window.error_rate, window.rejection_rate, window.latency.p99_ms
            measurements += [
                Measurement(
                    "errors",
                    errors,
                    thresholds.error_rate_warning,
                    thresholds.error_rate_critical,
                    f"{errors:.1%} of the requests of the last minute failed",
                ),
                Measurement(
                    "rejections",
                    rejections,
                    thresholds.rejection_rate_warning,
                    thresholds.rejection_rate_critical,
                    f"{rejections:.1%} of the requests of the last minute were rejected",
                ),
                Measurement(
                    "latency",
                    p99_ms,
                    thresholds.p99_warning_ms,
                    thresholds.p99_critical_ms,
                    f"p99 latency of the last minute is {p99_ms:.0f} ms",
                ),
            ]
        return measurements

    async def _send(self, channel: AlertChannel, alert: Alert) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                await channel.send(alert)
            except AlertNotSent as error:
                _log.warning("alert_not_sent", alert=alert.name, attempt=attempt, reason=str(error))
                if attempt < _ATTEMPTS:
                    await asyncio.sleep(_BACKOFF_S * attempt)
            else:
                self._metrics.alerts.labels(channel.name, alert.severity).inc()
                return
        self._metrics.alerts.labels(channel.name, "not_sent").inc()


def _dependency(name: str, state: DependencyState) -> Measurement:
    """Critical if a required dependency is unavailable, a warning for an optional one."""
    critical = 1.0 if state.required else 2.0
    return Measurement(f"dependency {name}", float(state.fault is not None), 1.0, critical, state.fault or "recovered")
