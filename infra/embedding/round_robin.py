"""Who is next: a queue of calls that each have many texts, served in turns. No clock, no I/O."""

from collections import deque
from collections.abc import Callable, Iterable


class RoundRobinQueue:
    """Takes one text of each waiting call in turn, so that an edit of one passage does not wait for a whole upload.

    A text may wait in several calls; ``wanted`` tells whether it is still to be taken when its turn comes.
    """

    def __init__(self) -> None:
        self._calls: deque[deque[str]] = deque()

    def add(self, texts: Iterable[str]) -> None:
        """Let a call wait with its texts; its first turn comes after those of all other calls."""
        call = deque(texts)
        if call:
            self._calls.append(call)

    def take(self, limit: int, wanted: Callable[[str], bool]) -> list[str]:
        """The next texts, at most ``limit`` and each once, longest first; what is not wanted is dropped.

        Longest first keeps like lengths together, and lets short ones fill the gaps at the end.
        """
        taken: dict[str, None] = {}
        while self._calls and len(taken) < limit:
            call = self._calls.popleft()
            while call:
                text = call.popleft()
                if text not in taken and wanted(text):
                    taken[text] = None
                    break
            if call:
                self._calls.append(call)
        return sorted(taken, key=len, reverse=True)
