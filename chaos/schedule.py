"""Fault schedule, a function of the seed."""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Kind(StrEnum):
    """Kinds of faults."""

    KILL = "kill"
    PAUSE = "pause"
    LATENCY = "latency"
    RESET = "reset"
    TIMEOUT = "timeout"
    HALF_OPEN = "half-open"
    DISK_FULL = "disk full"
    CLOCK_JUMP = "clock jump"
    ROLLING_RESTART = "rolling restart"


NETWORK: Final = (Kind.LATENCY, Kind.RESET, Kind.TIMEOUT, Kind.HALF_OPEN)
"""Faults of the connections between a worker and a store."""

MIN_DURATION_S: Final = 4.0
MAX_DURATION_S: Final = 9.0
"""Longer than the session timeout of a worker: a worker paused for this long loses its partitions."""

_LINKS_PER_ROUND: Final = 3


@dataclass(frozen=True, slots=True)
class Fault:
    """A scheduled fault.

    Attributes:
        target: a process, a link (worker and store, as ``index-1 redis``), or empty if the kind implies it.
        duration_s: 0 for a kill.
        number: random number for further choices.
    """

    kind: Kind
    target: str
    duration_s: float
    number: int

    @property
    def name(self) -> str:
        """Row of the report: kind and target, without the number of the process."""
        return f"{self.kind} {_kind_of(self.target)}".strip()


def schedule(
    seed: int, *, processes: Sequence[str], links: Sequence[str], single: Mapping[Kind, Sequence[str]]
) -> Iterator[Fault]:
    """Endless sequence of faults.

    Every kind of target is used once before any is used again, and likewise the processes of a kind.

    Args:
        seed: determines the sequence.
        processes: names such as ``index-1``. Names that differ in their number only are of one kind.
        links: worker and store, such as ``index-1 redis``.
        single: targets of the kinds that apply to neither processes nor links.
    """
    rng = random.Random(seed)  # noqa: S311 - no secret
    bags = {kind: _kinds(targets) for kind, targets in single.items()}
    bags |= dict.fromkeys((Kind.KILL, Kind.PAUSE), _kinds(processes))
    bags |= dict.fromkeys(NETWORK, _kinds(links))
    turns = {kind: _rotation(rng, groups) for kind, groups in sorted(bags.items())}
    round_kinds: list[Kind] = []
    while True:
        if not round_kinds:
            # A round kills and pauses every process. There are too many links for that.
            round_kinds = [
                kind for kind in turns for _ in range(_LINKS_PER_ROUND if kind in NETWORK else len(bags[kind]))
            ]
            rng.shuffle(round_kinds)
        kind = round_kinds.pop()
        duration_s = 0.0 if kind is Kind.KILL else rng.uniform(MIN_DURATION_S, MAX_DURATION_S)
        yield Fault(kind, next(turns[kind]), round(duration_s, 1), rng.randrange(1_000_000))


def _kinds(targets: Sequence[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for target in targets:
        groups.setdefault(_kind_of(target), []).append(target)
    return list(groups.values())


def _kind_of(target: str) -> str:
    """The name of a process without its number."""
    return re.sub(r"-\d+", "", target)


def _rotation(rng: random.Random, groups: Sequence[Sequence[str]]) -> Iterator[str]:
    """One target of each group in random order, endlessly; likewise within a group."""
    members = [_shuffled(rng, group) for group in groups]
    while True:
        for number in rng.sample(range(len(members)), len(members)):
            yield next(members[number])


def _shuffled(rng: random.Random, group: Sequence[str]) -> Iterator[str]:
    while True:
        yield from rng.sample(group, len(group))
