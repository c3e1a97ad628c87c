"""Selection of ports."""

import socket
from collections.abc import Iterable, Mapping
from typing import Final

from infra.local.state import StackError

HOST: Final = "127.0.0.1"
SPAN: Final = 1000
"""Range of ports above the preferred one. It is below the range of ephemeral ports."""

PREFERRED: Final = {
    "kafka": 9092,
    "kafka-controller": 19092,
    "opensearch": 9200,
    "opensearch-transport": 9300,
    "redis": 6379,
}


def choose(names: Iterable[str], requested: Mapping[str, int], previous: Mapping[str, int]) -> dict[str, int]:
    """A free port for each name: the requested one, or that of the previous run, or the next free one.

    Raises:
        StackError: a requested port is not free, or its name is unknown.
    """
    names = list(names)
    if unknown := requested.keys() - set(names):
        raise StackError(f"unknown port name {', '.join(sorted(unknown))}; this stack has {', '.join(names)}")
    chosen: dict[str, int] = {}
    for name in names:
        if name in requested:
            if not _is_free(requested[name]):
                raise StackError(f"port {requested[name]} for {name} is in use; free it or choose another")
            chosen[name] = requested[name]
            continue
        first = PREFERRED["-".join(part for part in name.split("-") if not part.isdigit())]
        taken = {*chosen.values(), *requested.values()}
        candidates = (previous.get(name, first), *range(first, first + SPAN))
        chosen[name] = next((port for port in candidates if port not in taken and _is_free(port)), 0)
        if chosen[name] == 0:
            raise StackError(f"no free port for {name} from {first} to {first + SPAN - 1}")
    return chosen


def free(count: int, *, first: int) -> list[int]:
    """The lowest free ports from ``first``.

    Raises:
        StackError: not enough ports are free.
    """
    found = [port for port in range(first, first + SPAN) if _is_free(port)][:count]
    if len(found) < count:
        raise StackError(f"only {len(found)} of {count} ports from {first} to {first + SPAN - 1} are free")
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # Like the servers: a port with connections in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen()
        except OSError:
            return False
        return True
