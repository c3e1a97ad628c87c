"""Determines which offset can be committed: never one beyond an unfinished record (I5)."""


class LaneCommits:
    """Records of one partition since its assignment.

    Records are delivered in offset order. Offsets may be missing between them (transaction markers, compaction). They
    may finish in any order. The lowest offset that is unfinished or not delivered yet can be committed.
    """

    __slots__ = ("_committed", "_next", "_open")

    def __init__(self) -> None:
        self._open: set[int] = set()
        self._next: int | None = None
        self._committed = 0

    def deliver(self, offset: int) -> None:
        """Record a delivery.

        An offset below the last one means that the consumer moved back (a rebalance, a seek). Everything from there on
        is delivered again, and nothing beyond it can be committed before it is finished again.
        """
        if self._next is None:
            # The first offset is the committed one. Afterwards only commits change it; it never decreases.
            self._committed = offset
        self._open.add(offset)
        self._next = offset + 1

    def finish(self, offset: int) -> None:
        """Record that a delivery is finished. Ignored for records that are not open."""
        self._open.discard(offset)

    def committable(self) -> int | None:
        """The offset from which to resume after a restart; None if it is committed already."""
        if self._next is None:
            return None
        offset = min(self._next, *self._open) if self._open else self._next
        return offset if offset > self._committed else None

    def committed(self, offset: int) -> None:
        """Record a successful commit. A failed one is not recorded, so it is retried."""
        self._committed = max(self._committed, offset)

    @property
    def open_count(self) -> int:
        """Number of records that are delivered and not finished."""
        return len(self._open)
