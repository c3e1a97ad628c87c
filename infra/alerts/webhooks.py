"""Alerts as HTTP requests with JSON bodies, and to Slack."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

import httpx
from pydantic import SecretStr
from typing_extensions import override

from infra.alerts.port import Alert, AlertChannel, AlertNotSent
from schemas.alerts import Severity

_TIMEOUT_S: Final = 5.0
_MARKS: Final[Mapping[Severity, str]] = {
    Severity.RESOLVED: ":white_check_mark:",
    Severity.WARNING: ":warning:",
    Severity.CRITICAL: ":rotating_light:",
}


class Webhook(AlertChannel):
    """Posts the fields of an alert as JSON.

    Args:
        url: target URL. It is a secret, because it authorizes the sender.
    """

    name = "webhook"

    def __init__(self, url: SecretStr) -> None:
        self._url = url
        self._http = httpx.AsyncClient(timeout=_TIMEOUT_S)

    @override
    async def send(self, alert: Alert) -> None:
        try:
            response = await self._http.post(self._url.get_secret_value(), json=self._body(alert))
        except httpx.HTTPError as error:
            # The message may contain the URL.
            raise AlertNotSent(f"{self.name}: {type(error).__name__}") from None
        if not response.is_success:
            raise AlertNotSent(f"{self.name}: status {response.status_code}")

    @override
    async def close(self) -> None:
        await self._http.aclose()

    def _body(self, alert: Alert) -> dict[str, Any]:
        return asdict(alert)


class SlackWebhook(Webhook):
    """Posts a line to an incoming webhook of Slack."""

    name = "slack"

    @override
    def _body(self, alert: Alert) -> dict[str, Any]:
        line = f"{_MARKS[alert.severity]} *{alert.severity}* {alert.name}: {alert.text} ({alert.source})"
        # Slack interprets these three characters as markup.
        return {"text": line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}
