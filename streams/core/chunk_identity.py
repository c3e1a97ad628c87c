"""Names of chunks: the same passage of the same document has the same name in every run."""

from base64 import b32encode
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b

from schemas.documents import DocumentKey
from schemas.events import PlannedChunk


def chunk_id(key: DocumentKey, text_sha256: str, occurrence: int, rewritten_at: str | None = None) -> str:
    """Name of one chunk: 26 characters of ``a-z2-7``.

    Args:
        key: the document it belongs to.
        text_sha256: identity of what is embedded.
        occurrence: how many chunks of the document before it have the same ``text_sha256``.
        rewritten_at: see ``chunk_ids``.
    """
    # A tenant has no NUL and no document id has, so two different inputs never join to the same bytes.
    parts = (key.tenant, key.document_id, text_sha256, str(occurrence))
    named = "\0".join(parts if rewritten_at is None else (*parts, rewritten_at))
    return b32encode(blake2b(named.encode(), digest_size=16).digest()).decode().rstrip("=").lower()


def chunk_ids(key: DocumentKey, chunks: Sequence[PlannedChunk], rewritten_at: str | None = None) -> list[str]:
    """Names of all chunks of a document, in their order; all different.

    Args:
        key: the document.
        chunks: of one version.
        rewritten_at: position of the event that writes the version anew, if it does. Its chunks have names that none
            had before: under an old name the index may remember a later removal, and refuse to take the chunk again.
    """
    seen: Counter[str] = Counter()
    ids = []
    for chunk in chunks:
        ids.append(chunk_id(key, chunk.text_sha256, seen[chunk.text_sha256], rewritten_at))
        seen[chunk.text_sha256] += 1
    return ids
