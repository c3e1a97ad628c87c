"""Event ids: UUID version 7 (RFC 9562), ordered by time."""

from typing import Final
from uuid import UUID

_VERSION_AND_VARIANT: Final = (0x7 << 76) | (0b10 << 62)
_RANDOM_MASK: Final = ~((0xF << 76) | (0b11 << 62))

RANDOM_BITS: Final = 80
"""Random bits of an ``event_id``. Version and variant overwrite six of them."""


def event_id(now_ms: int, random: int) -> str:
    """Id of an event accepted at ``now_ms`` (epoch milliseconds); ``random`` has ``RANDOM_BITS`` bits."""
    return str(UUID(int=(now_ms << RANDOM_BITS | random) & _RANDOM_MASK | _VERSION_AND_VARIANT))


def made_ms(event: str) -> float:
    """Acceptance time of an event id in epoch milliseconds; 0 if the id is not one of ``event_id``."""
    try:
        return float(UUID(event).int >> RANDOM_BITS)
    except ValueError:
        return 0.0
