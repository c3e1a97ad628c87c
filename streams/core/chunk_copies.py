"""Ids of copies of a passage. Stored passages are never overwritten, so that they can stay (I3).

An id is derived from all stored content (``streams.core.chunk_identity``). A version that rewrites equal content,
because the stored passages are not trusted, writes copies under new ids. It removes the old passages when all copies
are stored.
"""

from base64 import b32encode
from hashlib import blake2b

from schemas.index import COPY_MARK, original_id


def copy_id(chunk_id: str, writing: str) -> str:
    """Id of a copy.

    Args:
        chunk_id: id of the passage or of any copy of it.
        writing: name of the change that writes it; unique among the changes of a document.
    """
    digest = blake2b(writing.encode(), digest_size=8).digest()
    suffix = b32encode(digest).decode().rstrip("=").lower()
    return f"{original_id(chunk_id)}{COPY_MARK}{suffix}"
