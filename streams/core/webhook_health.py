"""How a webhook is doing, as a function of how its tries went. Pure."""

from schemas.webhooks import KeptWebhook


def failed(
    webhook: KeptWebhook, reason: str, *, now_ms: float, pause_ms: float, give_up_ms: float, is_gone: bool = False
) -> KeptWebhook:
    """One more try has failed.

    Args:
        webhook: as it was.
        reason: for people.
        now_ms: epoch milliseconds.
        pause_ms: until the next try.
        give_up_ms: a webhook that fails for so long is disabled.
        is_gone: its receiver wants nothing any more, which disables it at once.
    """
    since_ms = now_ms if webhook.failing_since_ms is None else webhook.failing_since_ms
    is_over = is_gone or now_ms - since_ms >= give_up_ms
    told = {
        "failures": webhook.failures + 1,
        "failing_since_ms": since_ms,
        "next_try_ms": now_ms + pause_ms,
        "last_failure": reason,
    }
    return webhook.model_copy(update=told if not is_over else told | {"next_try_ms": None, "disabled_ms": now_ms})


def disabled(webhook: KeptWebhook, reason: str, *, now_ms: float) -> KeptWebhook:
    """Nothing more is sent to it or kept for it."""
    update = {"disabled_ms": now_ms, "next_try_ms": None, "last_failure": reason}
    return webhook.model_copy(update=update)


def delivered(webhook: KeptWebhook) -> KeptWebhook:
    """Its receiver takes messages; what failed is over, also for one that was disabled."""
    update = {"failures": 0, "failing_since_ms": None, "next_try_ms": None, "last_failure": None, "disabled_ms": None}
    return webhook.model_copy(update=update)


def is_due(webhook: KeptWebhook, *, now_ms: float) -> bool:
    """Whether messages that wait may be tried."""
    return webhook.disabled_ms is None and (webhook.next_try_ms is None or webhook.next_try_ms <= now_ms)


def pause_ms(failures: int, *, first_ms: float, longest_ms: float, jitter: float) -> float:
    """The pause after that many failures in a row: doubled with each, times ``jitter`` of 0.5 to 1."""
    return min(longest_ms, first_ms * 2.0 ** min(max(failures - 1, 0), 60)) * jitter
