"""Passages that were read lately, by the write that was found: the same write is not read twice."""

from collections import OrderedDict
from typing import Final

from schemas.index import StoredChunk
from schemas.search import Hit

_OVERHEAD_BYTES: Final = 1_500


class PassageCache:
    """Passages of the searches of one process. Nothing in it ages: another write has another name.

    Args:
        max_bytes: of text, and what comes with it; those not asked for longest give way.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._passages: OrderedDict[tuple[str, tuple[str, str]], StoredChunk] = OrderedDict()

    def get(self, hit: Hit) -> StoredChunk | None:
        """The passage as the search found it, if it is here."""
        if hit.written is None:
            return None
        name = (hit.chunk_id, hit.written)
        found = self._passages.get(name)
        if found is not None:
            self._passages.move_to_end(name)
        return found

    def put(self, hit: Hit, passage: StoredChunk) -> None:
        """Keep what was read for ``hit``, unless it was written anew between the search and the reading."""
        if hit.written is None or hit.written[1] != passage.position or (hit.chunk_id, hit.written) in self._passages:
            return
        self._passages[hit.chunk_id, hit.written] = passage
        self._bytes += _size_bytes(passage)
        while self._bytes > self._max_bytes:
            _, forgotten = self._passages.popitem(last=False)
            self._bytes -= _size_bytes(forgotten)


def _size_bytes(passage: StoredChunk) -> int:
    return len(passage.text) + _OVERHEAD_BYTES
