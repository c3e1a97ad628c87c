"""The invariants as pure predicates: what was accepted, told, committed and answered, against what is searchable.

One set of rules for the simulation, the tests on real servers and an installation under faults; ``observed.py``
collects what they judge. I1 to I7 are told in ``docs/reliability.md``.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from schemas.documents import Outcome


@dataclass(frozen=True, slots=True)
class Version:
    """One accepted event, as the invariants see it.

    Attributes:
        number: its document version.
        place: its place in the lane; of equal versions the first counts.
        readable: False where its content cannot be parsed.
        passages: ids of what is searchable once it stands; none for a delete.
        groups: who may see it; empty means every reader of the tenant.
    """

    number: int
    place: int
    readable: bool
    deleted: bool
    passages: frozenset[str]
    groups: frozenset[str] = frozenset()

    def may_be_seen(self, groups: Collection[str]) -> bool:
        """Whether a reader of its tenant with these groups may see it."""
        return not self.groups or not self.groups.isdisjoint(groups)


def winner(versions: Iterable[Version]) -> Version | None:
    """The version that stands when all have ended: the newest that can be read, of equal ones the first."""
    return max((one for one in versions if one.readable), key=lambda one: (one.number, -one.place), default=None)


def newer_wins(versions: Collection[Version], searchable: Collection[str]) -> bool:
    """I1, at rest: exactly the winner's passages are searchable."""
    return frozenset(searchable) == passages_at_rest(versions)


def passages_at_rest(versions: Iterable[Version]) -> frozenset[str]:
    """What is searchable of a document once all its versions have ended."""
    standing = winner(versions)
    return standing.passages if standing else frozenset()


def versions_only_grow(earlier: int, later: int) -> bool:
    """I1, at any time: of the manifest's version, and of assigned versions in the order of their acceptance."""
    return earlier <= later


def not_resurrected(told: Iterable[Version], searchable: Mapping[str, int]) -> bool:
    """I2: nothing of a version at or below a delete that is told as done is searchable.

    Args:
        told: versions told as done so far.
        searchable: passage id → version that wrote it.
    """
    deleted = max((one.number for one in told if one.deleted), default=-1)
    return all(version > deleted for version in searchable.values())


def never_gone(told: Collection[Version], accepted: Iterable[Version], searchable: Collection[str]) -> bool:
    """I3: the newest version told as done, or a newer one, is searchable as a whole."""
    newest = newest_of(told)
    return newest is None or any(one.passages <= frozenset(searchable) for one in (newest, *_since(newest, accepted)))


def never_mixed(accepted: Iterable[Version], answered: Collection[str]) -> bool:
    """I3, in one answer: its passages of a document are all of one version."""
    return any(frozenset(answered) <= one.passages for one in accepted if one.readable) or not answered


def told_is_true(told: Version, accepted: Iterable[Version], searchable: Collection[str]) -> bool:
    """I3, at the instant a version is told as done: nothing that it took away is searchable any more."""
    may_be_there = told.passages.union(*(one.passages for one in _since(told, accepted)))
    return frozenset(searchable) <= may_be_there


def answer_is_current(applied: Collection[Version], accepted: Iterable[Version], answered: Collection[str]) -> bool:
    """I4: an answer holds nothing that a change at or before its positions took away.

    Args:
        applied: versions of the document told as done at or before the positions that the answer claims.
        accepted: all its versions.
        answered: its passages in the answer.
    """
    newest = newest_of(applied)
    return newest is None or told_is_true(newest, accepted, answered)


def durable_before_commit(committed: int, ended: Collection[int]) -> bool:
    """I5: what every record below a committed offset led to is in the next stream."""
    return all(offset in ended for offset in range(committed))


def right_outcome(version: Version, versions: Collection[Version], outcome: Outcome) -> bool:
    """I5: how an event ended, as it was first told."""
    if not version.readable:
        return outcome in {Outcome.DEAD_LETTER, Outcome.SUPERSEDED}
    if version is winner(versions):
        return outcome is Outcome.DONE
    newer_before = any(one.readable and one.number >= version.number and one.place < version.place for one in versions)
    return outcome is Outcome.SUPERSEDED if newer_before else outcome in {Outcome.DONE, Outcome.SUPERSEDED}


def replay_is_harmless(before: Mapping[str, int], after: Mapping[str, int]) -> bool:
    """I6: what is searchable, and which version wrote it, before and after a part of the log is read again."""
    return before == after


def tenants_never_meet(
    applied: Collection[Version], accepted: Collection[Version], groups: Collection[str], answered: Collection[str]
) -> bool:
    """I7: a reader sees only passages of versions that are for the reader's groups.

    Args:
        applied: as in ``answer_is_current``; a version before the newest of them is no excuse for showing a passage.
        accepted: versions of the document under the reader's own tenant; none where it belongs to another.
        groups: the reader's.
        answered: passages of the document in the answer.
    """
    newest = newest_of(applied)
    standing = accepted if newest is None else [newest, *_since(newest, accepted)]
    return frozenset(answered) <= frozenset[str]().union(*(one.passages for one in standing if one.may_be_seen(groups)))


def newest_of(versions: Iterable[Version]) -> Version | None:
    """The one with the largest number; the first of equal ones."""
    return max(versions, key=lambda one: one.number, default=None)


def _since(version: Version, accepted: Iterable[Version]) -> list[Version]:
    return [one for one in accepted if one.number > version.number and one.readable]
