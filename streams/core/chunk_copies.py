"""Ids of copies of a passage: what stands in the index is never written over, so that it can stay (I3).

An id follows from all stored content (``streams.core.chunk_identity``). A version that writes the same content again,
because what is there is not trusted, writes copies under ids of their own, and removes what was there when all copies
are in.
"""

from base64 import b32encode
from hashlib import blake2b

from schemas.index import COPY_MARK, original_id


def copy_id(chunk_id: str, writing: str) -> str:
    """Id of a copy.

    Args:
        chunk_id: of the passage or of any copy of it.
        writing: names the change that writes it; no two changes of a document have the same.
    """
    digest = blake2b(writing.encode(), digest_size=8).digest()
    name = b32encode(digest).decode().rstrip("=").lower()
    return f"{original_id(chunk_id)}{COPY_MARK}{name}"
