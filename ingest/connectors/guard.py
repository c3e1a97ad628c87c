"""The brake before a mass deletion: an unmounted folder looks just like one that was emptied."""

from typing import Final

MOST_DELETIONS: Final = 10
MOST_SHARE: Final = 0.10


class TooManyDeletions(Exception):
    """The source has lost so much that somebody should confirm it."""


def check_deletions(missing: int, known: int, *, confirmed: bool) -> None:
    """Let a listing pass that takes away ``missing`` of ``known`` documents.

    Raises:
        TooManyDeletions: these are more than 10 documents and more than 10 % of all, and nobody confirmed it.
    """
    if missing > MOST_DELETIONS and missing > MOST_SHARE * known and not confirmed:
        raise TooManyDeletions(
            f"{missing} of {known} documents are gone from the source; nothing was deleted. "
            "Check that the source is complete, then confirm the deletion"
        )
