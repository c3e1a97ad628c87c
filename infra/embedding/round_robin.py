"""Round-robin queue of texts. No clock, no I/O."""

from collections import deque
from collections.abc import Callable, Iterable


class RoundRobinQueue:
    """Takes one text of each waiting call in turn, so that a small edit is not delayed by a large upload.

    Several calls may contain the same text; ``is_wanted`` decides when it is taken.
    """

    def __init__(self) -> None:
        self._calls: deque[deque[str]] = deque()

    def add(self, texts: Iterable[str]) -> None:
        """Enqueue the texts of a call. Its first turn follows those of all waiting calls."""
        call = deque(texts)
        if call:
            self._calls.append(call)

    def take(self, limit: int, is_wanted: Callable[[str], bool]) -> list[str]:
        """Dequeue up to ``limit`` distinct texts, longest first; drops texts that are not wanted.

        This order groups texts of similar length, and short texts fill the gaps at the end.
        """
        taken: dict[str, None] = {}
        while self._calls and len(taken) < limit:
            call = self._calls.popleft()
            while call:
                text = call.popleft()
                if text not in taken and is_wanted(text):
                    taken[text] = None
                    break
            if call:
                self._calls.append(call)
        return sorted(taken, key=len, reverse=True)
