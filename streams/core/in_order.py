"""Returns the outcomes of a batch in the order of its records, although they become known in another order."""

from collections.abc import Mapping

from streams.core.outcomes import Outcome


class OrderedOutcomes:
    """Outcomes of the records of a batch, by their index in it. They may become known in any order."""

    def __init__(self) -> None:
        self._outcomes: dict[int, Outcome] = {}
        self._returned = 0

    def __contains__(self, number: int) -> bool:
        return number in self._outcomes

    def add(self, outcomes: Mapping[int, Outcome]) -> None:
        """Add outcomes."""
        self._outcomes |= outcomes

    def ready(self) -> list[Outcome]:
        """Outcomes that were not returned before, up to the first record without one."""
        end = self._returned
        while end in self._outcomes:
            end += 1
        ready = [self._outcomes[number] for number in range(self._returned, end)]
        self._returned = end
        return ready
