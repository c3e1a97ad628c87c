"""Document ownership: a connector may change its own documents; requests without a connector may change any."""

from schemas.documents import LifeState
from schemas.index import Manifest


def other_owner(manifest: Manifest | None, connector: str | None, *, take_over: bool) -> str | None:
    """Owner of a live document that ``connector`` may not change; None if it may.

    Args:
        manifest: manifest of the document, if any.
        connector: requesting connector; None for a request without one, which may change any document.
        take_over: the request takes over documents of other owners.
    """
    if manifest is None or manifest.state is not LifeState.LIVE or connector is None or take_over:
        return None
    return manifest.connector if manifest.connector not in {None, connector} else None


def owner_refusal(document_id: str, owner: str, connector: str) -> str:
    """Message for a connector that may not change a document of another owner."""
    return (
        f"document {document_id!r} belongs to connector {owner!r}, not to {connector!r}. Use a prefix for the ids of "
        f"this source (--prefix), send as that connector (--name {owner}), or take over the document (--take-over, or "
        "`take_over` in the request)"
    )
