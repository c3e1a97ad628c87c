"""State of a webhook as a function of its delivery attempts. Pure."""

from schemas.webhooks import KeptWebhook


def failed(
    webhook: KeptWebhook, reason: str, *, now_ms: float, pause_ms: float, give_up_ms: float, is_gone: bool = False
) -> KeptWebhook:
    """Record a failed attempt.

    Args:
        webhook: state before the attempt.
        reason: for operators.
        now_ms: epoch milliseconds.
        pause_ms: time until the next attempt.
        give_up_ms: a webhook that fails for this long is disabled.
        is_gone: the receiver wants no more messages; disables the webhook immediately.
    """
    since_ms = now_ms if webhook.failing_since_ms is None else webhook.failing_since_ms
    is_disabled = is_gone or now_ms - since_ms >= give_up_ms
    update = {
        "failures": webhook.failures + 1,
        "failing_since_ms": since_ms,
        "next_try_ms": now_ms + pause_ms,
        "last_failure": reason,
    }
    return webhook.model_copy(
        update=update if not is_disabled else update | {"next_try_ms": None, "disabled_ms": now_ms}
    )


def disabled(webhook: KeptWebhook, reason: str, *, now_ms: float) -> KeptWebhook:
    """Disable a webhook: nothing is sent to it or kept for it."""
    update = {"disabled_ms": now_ms, "next_try_ms": None, "last_failure": reason}
    return webhook.model_copy(update=update)


def delivered(webhook: KeptWebhook) -> KeptWebhook:
    """Record a successful delivery. Resets failures, also of a disabled webhook."""
    update = {"failures": 0, "failing_since_ms": None, "next_try_ms": None, "last_failure": None, "disabled_ms": None}
    return webhook.model_copy(update=update)


def is_due(webhook: KeptWebhook, *, now_ms: float) -> bool:
    """Whether waiting messages may be sent."""
    return webhook.disabled_ms is None and (webhook.next_try_ms is None or webhook.next_try_ms <= now_ms)


def pause_ms(failures: int, *, first_ms: float, longest_ms: float, jitter: float) -> float:
    """Pause after a number of consecutive failures: doubles with each, times ``jitter`` of 0.5 to 1."""
    return min(longest_ms, first_ms * 2.0 ** min(max(failures - 1, 0), 60)) * jitter
