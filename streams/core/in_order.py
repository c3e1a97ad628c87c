"""Outcomes of a batch, told in its order, although they become known in another."""

from collections.abc import Mapping

from schemas.records import Record
from streams.core.outcomes import Finished, Outcome


class InOrder:
    """What is known of the outcomes of a batch's records, which go by their numbers in it."""

    def __init__(self) -> None:
        self._outcomes: dict[int, Outcome] = {}
        self._carriers: dict[int, int] = {}
        self._told = 0

    def __contains__(self, number: int) -> bool:
        return number in self._outcomes

    def end(self, outcomes: Mapping[int, Outcome]) -> None:
        """Records that ended by themselves."""
        self._outcomes |= outcomes

    def end_with(self, number: int, other: int, *news: Record) -> None:
        """A record that ended because of another one, such as a version by a newer one.

        Its news goes behind the later of the two, never before: a position is not reached until its content is. And it
        is not told before that one, either: its record would end, and be committed, and a crash lose the news (I5).
        """
        self._outcomes.setdefault(number, Finished())
        last = max(number, other)
        self._outcomes[last] = self._outcomes[last].followed_by(*news)
        self._carriers[number] = last

    def ready(self) -> list[Outcome]:
        """Outcomes that may be told now, from the first that was not told yet on, without a gap."""
        end = self._told
        while end in self._outcomes:
            end += 1
        carried = self._carriers.items()
        while early := [number for number, carrier in carried if self._told <= number < end <= carrier]:
            end = min(early)
        ready = [self._outcomes[number] for number in range(self._told, end)]
        self._told = end
        return ready
