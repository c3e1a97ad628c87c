"""In-process cache of passages, keyed by the write that the search returned."""

from collections import OrderedDict
from typing import Final

from schemas.index import StoredChunk
from schemas.search import Hit

_OVERHEAD_BYTES: Final = 1_500
"""Approximate size of an entry besides its text."""


class PassageCache:
    """LRU cache of passages. Entries never become stale: another write of a passage has another key.

    Args:
        max_bytes: approximate total size; the least recently used entries are evicted.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._passages: OrderedDict[tuple[str, tuple[str, str]], StoredChunk] = OrderedDict()

    def get(self, hit: Hit) -> StoredChunk | None:
        """The passage as the search returned it, or None."""
        if hit.written is None:
            return None
        key = (hit.chunk_id, hit.written)
        passage = self._passages.get(key)
        if passage is not None:
            self._passages.move_to_end(key)
        return passage

    def put(self, hit: Hit, passage: StoredChunk) -> None:
        """Store what was fetched for ``hit``, unless the passage was rewritten between search and fetch."""
        if hit.written is None or hit.written[1] != passage.position or (hit.chunk_id, hit.written) in self._passages:
            return
        self._passages[hit.chunk_id, hit.written] = passage
        self._size_bytes += _size_bytes(passage)
        while self._size_bytes > self._max_bytes:
            _, evicted = self._passages.popitem(last=False)
            self._size_bytes -= _size_bytes(evicted)


def _size_bytes(passage: StoredChunk) -> int:
    return len(passage.text) + _OVERHEAD_BYTES
