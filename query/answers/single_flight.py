"""Single flight: concurrent requests for the same answer share one execution."""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from query.cache.freshness import ReadSnapshot, SharedRead


class Flight(Protocol):
    """An execution under way."""

    @property
    def read(self) -> SharedRead:
        """The latest read of all requests that share it."""
        ...


F = TypeVar("F", bound=Flight)


class SingleFlight(Generic[F]):
    """Flights by cache key. A request joins a flight only if its answer is fresh enough for the request."""

    def __init__(self) -> None:
        self._flights: dict[str, F] = {}

    def current(self, key: str) -> F | None:
        """The flight that a request for ``key`` would try to join."""
        return self._flights.get(key)

    def join_or_start(self, key: str, snapshot: ReadSnapshot, start: Callable[[SharedRead], F]) -> F:
        """Join the current flight, or start one that replaces it."""
        flight = self._flights.get(key)
        if flight is None or not flight.read.join(snapshot):
            flight = self._flights[key] = start(SharedRead(snapshot))
        return flight

    def end(self, key: str, read: SharedRead) -> None:
        """Close the flight of ``read`` to further requests; a flight that has replaced it stays."""
        flight = self._flights.get(key)
        if flight is not None and flight.read is read:
            del self._flights[key]

    def flights(self) -> tuple[F, ...]:
        """All current flights."""
        return tuple(self._flights.values())
