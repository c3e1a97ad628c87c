"""Which offset may be committed: never one beyond an unfinished record (I5)."""


class LaneCommits:
    """The records of one partition since it was assigned.

    Records are delivered in offset order; between two of them offsets may be missing (transaction markers, compaction).
    They may finish in any order. Committable is the lowest offset that is open or still to be delivered.
    """

    __slots__ = ("_committed", "_next", "_open")

    def __init__(self) -> None:
        self._open: set[int] = set()
        self._next: int | None = None
        self._committed = 0

    def deliver(self, offset: int) -> None:
        """Note that a record is handed out.

        An offset below the last one means that reading began again further back (a rebalance, a seek): everything from
        there on is handed out again, and nothing beyond it is committable before it has ended again.
        """
        if self._next is None:
            # Reading begins where the group has committed. Later, only commits move this: it never goes back.
            self._committed = offset
        self._open.add(offset)
        self._next = offset + 1

    def finish(self, offset: int) -> None:
        """Note that a record ended; one that is not open is ignored."""
        self._open.discard(offset)

    def committable(self) -> int | None:
        """The offset to read next after a restart, or None where the broker knows it already."""
        if self._next is None:
            return None
        offset = min(self._next, *self._open) if self._open else self._next
        return offset if offset > self._committed else None

    def committed(self, offset: int) -> None:
        """Note that the broker took a commit. A failed one is not noted, so it is tried again."""
        self._committed = max(self._committed, offset)

    @property
    def open_count(self) -> int:
        """Records handed out and not finished."""
        return len(self._open)
