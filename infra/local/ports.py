"""Which ports a stack uses."""

import socket
from collections.abc import Iterable, Mapping
from typing import Final

from infra.local.state import StackError

HOST: Final = "127.0.0.1"
SPAN: Final = 1000
"""How far above its preferred port a server may end up. This stays below the range that outgoing connections use."""

PREFERRED: Final = {
    "kafka": 9092,
    "kafka-controller": 19092,
    "opensearch": 9200,
    "opensearch-transport": 9300,
    "redis": 6379,
}


def choose(names: Iterable[str], told: Mapping[str, int], remembered: Mapping[str, int]) -> dict[str, int]:
    """A free port for each name: the one told, else the one remembered from the last run, else the next free default.

    Raises:
        StackError: a port that was told is not free, or a name is unknown.
    """
    names = list(names)
    if unknown := told.keys() - set(names):
        raise StackError(f"there is no port named {', '.join(sorted(unknown))}; this stack has {', '.join(names)}")
    chosen: dict[str, int] = {}
    for name in names:
        if name in told:
            if not _is_free(told[name]):
                raise StackError(f"port {told[name]} for {name} is in use; free it or choose another")
            chosen[name] = told[name]
            continue
        first = PREFERRED["-".join(part for part in name.split("-") if not part.isdigit())]
        taken = {*chosen.values(), *told.values()}
        candidates = (remembered.get(name, first), *range(first, first + SPAN))
        chosen[name] = next((port for port in candidates if port not in taken and _is_free(port)), 0)
        if chosen[name] == 0:
            raise StackError(f"no free port for {name} from {first} to {first + SPAN - 1}")
    return chosen


def free(count: int, *, first: int) -> list[int]:
    """The lowest free ports from ``first`` on.

    Raises:
        StackError: there are not enough.
    """
    found = [port for port in range(first, first + SPAN) if _is_free(port)][:count]
    if len(found) < count:
        raise StackError(f"only {len(found)} of {count} ports from {first} to {first + SPAN - 1} are free")
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do: a port whose last connections linger in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen()
        except OSError:
            return False
        return True
