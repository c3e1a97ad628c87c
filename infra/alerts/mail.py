"""Alerts by e-mail."""

import asyncio
import smtplib
import ssl
from email.message import EmailMessage
from email.utils import formatdate
from typing import Final
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr
from typing_extensions import override

from infra.alerts.port import Alert, AlertChannel, AlertNotSent

_TIMEOUT_S: Final = 10.0
_PORTS: Final = {"smtp": 587, "smtps": 465}


class Mail(AlertChannel):
    """Alerts by e-mail.

    Args:
        url: ``smtp://USER:PASSWORD@HOST:PORT``, with STARTTLS before a login, or ``smtps://…``.
        sender: address of the sender.
        recipients: addresses of the recipients.

    Raises:
        ValueError: the URL has another scheme or no host.
    """

    name = "mail"

    def __init__(self, url: SecretStr, *, sender: str, recipients: tuple[str, ...]) -> None:
        self._server = urlsplit(url.get_secret_value())
        if self._server.scheme not in _PORTS or not self._server.hostname:
            raise ValueError("FRESHLINE_ALERTS__SMTP_URL must have the form smtp://USER:PASSWORD@HOST:587 or smtps://…")
        self._sender = sender
        self._recipients = recipients

    @override
    async def send(self, alert: Alert) -> None:
        message = EmailMessage()
        message["Subject"] = f"[{alert.severity}] {alert.name} on {alert.source}"
        message["From"] = self._sender
        message["To"] = ", ".join(self._recipients)
        message["Date"] = formatdate(alert.at_ms / 1_000)
        message.set_content(f"{alert.text}\n\nSeverity: {alert.severity}. Source: {alert.source}.\n")
        try:
            await asyncio.to_thread(self._send, message)
        except (OSError, smtplib.SMTPException) as error:
            raise AlertNotSent(f"{self.name}: {type(error).__name__}") from None

    @override
    async def close(self) -> None:
        pass

    def _send(self, message: EmailMessage) -> None:
        scheme, host = self._server.scheme, self._server.hostname or ""
        port = self._server.port or _PORTS[scheme]
        context = ssl.create_default_context()
        smtp = (
            smtplib.SMTP_SSL(host, port, timeout=_TIMEOUT_S, context=context)
            if scheme == "smtps"
            else smtplib.SMTP(host, port, timeout=_TIMEOUT_S)
        )
        with smtp:
            if self._server.username:
                if scheme == "smtp":
                    smtp.starttls(context=context)  # never send a password unencrypted
                smtp.login(unquote(self._server.username), unquote(self._server.password or ""))
            smtp.send_message(message)
