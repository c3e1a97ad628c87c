"""Who may replace or delete a document: its owner, whoever names no connector, and whoever says that it is meant."""

from schemas.documents import LifeState
from schemas.index import Manifest


def other_owner(manifest: Manifest | None, connector: str | None, *, take_over: bool) -> str | None:
    """The connector that owns the live document and does not let ``connector`` change it; None where it may.

    Args:
        manifest: of the document; None where there is none.
        connector: who asks; None for a request of no connector, which may change any document.
        take_over: that the document has another owner is known, and it is meant.
    """
    if manifest is None or manifest.state is not LifeState.LIVE or connector is None or take_over:
        return None
    return manifest.connector if manifest.connector not in {None, connector} else None


def owner_refusal(document_id: str, owner: str, connector: str) -> str:
    """Why a connector may not change a document that another one owns, and the ways out."""
    return (
        f"document {document_id!r} belongs to connector {owner!r}, and this is connector {connector!r}. Put a prefix "
        f"before the ids of this source (--prefix), send as that connector (--name {owner}), or take the document over "
        "(--take-over, or `take_over` with the request)"
    )
