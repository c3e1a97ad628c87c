"""Releases the outcomes of a batch in the order of its records, although they become known in another order."""

from collections.abc import Mapping

from schemas.records import Record
from streams.core.outcomes import Finished, Outcome


class OrderedOutcomes:
    """Known outcomes of a batch, by the number of the record in it."""

    def __init__(self) -> None:
        self._outcomes: dict[int, Outcome] = {}
        self._reported_with: dict[int, int] = {}
        self._released = 0

    def __contains__(self, number: int) -> bool:
        return number in self._outcomes

    def add(self, outcomes: Mapping[int, Outcome]) -> None:
        """Add outcomes."""
        self._outcomes |= outcomes

    def add_with(self, number: int, other: int, *records: Record) -> None:
        """Add a record that finished because of another one, such as an older version because of a newer one.

        Its records follow those of the later of the two, because a position must not be reached before its content. It
        is not released before that one: it would be committed, and a crash would lose its records (I5).
        """
        self._outcomes.setdefault(number, Finished())
        last = max(number, other)
        self._outcomes[last] = self._outcomes[last].followed_by(*records)
        self._reported_with[number] = last

    def ready(self) -> list[Outcome]:
        """Outcomes that can be released now: a gapless range that starts after the last released one."""
        end = self._released
        while end in self._outcomes:
            end += 1
        reported_with = self._reported_with.items()
        while blocked := [number for number, last in reported_with if self._released <= number < end <= last]:
            end = min(blocked)
        ready = [self._outcomes[number] for number in range(self._released, end)]
        self._released = end
        return ready
