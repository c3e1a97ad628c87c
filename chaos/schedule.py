"""Which faults come, in which order: a function of the seed alone."""

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
"""Faults between a worker and a store."""

SHORTEST_HOLD_S: Final = 4.0
LONGEST_HOLD_S: Final = 9.0
"""Longer than a worker's session: one that is paused for so long has lost its partitions when it goes on."""

_LINKS_A_TURN: Final = 3


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        target: a process, a worker and a store as ``index-1 redis``, or nothing where the kind says it all.
        hold_s: how long it lasts; a kill is over at once.
        number: drawn for whatever else is to be chosen.
    """

    kind: Kind
    target: str
    hold_s: float
    number: int

    @property
    def name(self) -> str:
        """What the table calls it: the kind, and what it strikes without its number."""
        return f"{self.kind} {_kind_of(self.target)}".strip()


def schedule(
    seed: int, *, processes: Sequence[str], links: Sequence[str], single: Mapping[Kind, Sequence[str]]
) -> Iterator[Fault]:
    """Faults without end. Each kind of target comes once before any comes again, and so do processes of a kind.

    Args:
        seed: decides everything.
        processes: names such as ``index-1``; those that differ in their number only are of a kind.
        links: worker and store, such as ``index-1 redis``.
        single: kinds that are neither of processes nor of links → what they may strike.
    """
    rng = random.Random(seed)  # noqa: S311 - no secret
    bags = {kind: _kinds(targets) for kind, targets in single.items()}
    bags |= dict.fromkeys((Kind.KILL, Kind.PAUSE), _kinds(processes))
    bags |= dict.fromkeys(NETWORK, _kinds(links))
    turns = {kind: _rotation(rng, groups) for kind, groups in sorted(bags.items())}
    wheel: list[Kind] = []
    while True:
        if not wheel:
            # Every process is killed and paused in one turn; of links there are too many for that.
            wheel = [kind for kind in turns for _ in range(_LINKS_A_TURN if kind in NETWORK else len(bags[kind]))]
            rng.shuffle(wheel)
        kind = wheel.pop()
        hold_s = 0.0 if kind is Kind.KILL else rng.uniform(SHORTEST_HOLD_S, LONGEST_HOLD_S)
        yield Fault(kind, next(turns[kind]), round(hold_s, 1), rng.randrange(1_000_000))


def _kinds(targets: Sequence[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for target in targets:
        groups.setdefault(_kind_of(target), []).append(target)
    return list(groups.values())


def _kind_of(target: str) -> str:
    """A process without its number."""
    return re.sub(r"-\d+", "", target)


def _rotation(rng: random.Random, groups: Sequence[Sequence[str]]) -> Iterator[str]:
    """One of each group in a new order, again and again; within a group likewise."""
    members = [_shuffled(rng, group) for group in groups]
    while True:
        for number in rng.sample(range(len(members)), len(members)):
            yield next(members[number])


def _shuffled(rng: random.Random, group: Sequence[str]) -> Iterator[str]:
    while True:
        yield from rng.sample(group, len(group))
