"""Guard against accidental mass deletions: an unmounted folder looks like an empty one."""

from typing import Final

MAX_DELETIONS: Final = 10
MAX_DELETED_FRACTION: Final = 0.10


class TooManyDeletions(Exception):
    """The deletions exceed the limits and require confirmation."""


def check_deletions(missing: int, total: int, *, confirmed: bool) -> None:
    """Check the deletion of ``missing`` of ``total`` documents.

    Raises:
        TooManyDeletions: more than 10 documents and more than 10 % of all, without confirmation.
    """
    if missing > MAX_DELETIONS and missing > MAX_DELETED_FRACTION * total and not confirmed:
        raise TooManyDeletions(
            f"{missing} of {total} documents are missing from the source; nothing was deleted. "
            "Check that the source is complete, then confirm the deletion"
        )
