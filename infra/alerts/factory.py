"""Creation of alert channels from the settings."""

from infra.alerts.mail import Mail
from infra.alerts.port import AlertChannel
from infra.alerts.webhooks import SlackWebhook, Webhook
from infra.settings import AlertSettings


def open_channels(settings: AlertSettings) -> list[AlertChannel]:
    """Open the configured channels.

    Raises:
        ValueError: a setting that a channel requires is missing or invalid.
    """
    channels: list[AlertChannel] = []
    if settings.slack_url is not None:
        channels.append(SlackWebhook(settings.slack_url))
    if settings.webhook_url is not None:
        channels.append(Webhook(settings.webhook_url))
    if settings.smtp_url is not None:
        recipients = tuple(filter(None, (one.strip() for one in (settings.mail_to or "").split(","))))
        if not recipients or not settings.mail_from:
            raise ValueError("FRESHLINE_ALERTS__MAIL_FROM and __MAIL_TO must be set with an SMTP URL")
        channels.append(Mail(settings.smtp_url, sender=settings.mail_from, recipients=recipients))
    return channels
