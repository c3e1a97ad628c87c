"""The invariants I1 to I7 as pure predicates over accepted, completed, committed, searchable and answered versions.

Simulation, system tests and chaos runs share them; ``observed.py`` applies them to a history. ``docs/reliability.md``
describes them.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from schemas.documents import Outcome


@dataclass(frozen=True, slots=True)
class Version:
    """An accepted event.

    Attributes:
        number: document version.
        place: offset in its partition. Of equal versions the first counts.
        readable: False if its content cannot be parsed.
        passages: ids of its passages; none for a delete.
        groups: groups that may see it; empty for all readers of the tenant.
    """

    number: int
    place: int
    readable: bool
    deleted: bool
    passages: frozenset[str]
    groups: frozenset[str] = frozenset()

    def may_be_seen(self, groups: Collection[str]) -> bool:
        """Whether a reader of the tenant with these groups may see it."""
        return not self.groups or not self.groups.isdisjoint(groups)


def winner(versions: Iterable[Version]) -> Version | None:
    """The final version: the newest readable one, of equal versions the first."""
    return max((one for one in versions if one.readable), key=lambda one: (one.number, -one.place), default=None)


def newer_wins(versions: Collection[Version], searchable: Collection[str]) -> bool:
    """I1, when idle: exactly the passages of the winner are searchable."""
    return frozenset(searchable) == passages_at_rest(versions)


def passages_at_rest(versions: Iterable[Version]) -> frozenset[str]:
    """Searchable passages of a document after all its versions have completed."""
    final = winner(versions)
    return final.passages if final else frozenset()


def versions_only_grow(earlier: int, later: int) -> bool:
    """I1, at any time: manifest versions, and assigned versions in order of acceptance, never decrease."""
    return earlier <= later


def not_resurrected(completed: Iterable[Version], searchable: Mapping[str, int]) -> bool:
    """I2: no passage of a version at or below a completed delete is searchable.

    Args:
        completed: versions reported as done.
        searchable: passage id → version that wrote it.
    """
    deleted = max((one.number for one in completed if one.deleted), default=-1)
    return all(version > deleted for version in searchable.values())


def never_missing(completed: Collection[Version], accepted: Iterable[Version], searchable: Collection[str]) -> bool:
    """I3: all passages of the newest completed version, or of a newer one, are searchable."""
    newest = newest_of(completed)
    return newest is None or any(one.passages <= frozenset(searchable) for one in (newest, *_since(newest, accepted)))


def never_mixed(accepted: Iterable[Version], answered: Collection[str]) -> bool:
    """I3, within an answer: its passages of a document belong to one version."""
    return any(frozenset(answered) <= one.passages for one in accepted if one.readable) or not answered


def outcome_is_true(completed: Version, accepted: Iterable[Version], searchable: Collection[str]) -> bool:
    """I3, when a version is reported as done: no passage that it removed is searchable."""
    allowed = completed.passages.union(*(one.passages for one in _since(completed, accepted)))
    return frozenset(searchable) <= allowed


def answer_is_current(applied: Collection[Version], accepted: Iterable[Version], answered: Collection[str]) -> bool:
    """I4: an answer has no passage that a change at or before its positions removed.

    Args:
        applied: completed versions of the document at or before the positions of the answer.
        accepted: all versions of the document.
        answered: passages of the document in the answer.
    """
    newest = newest_of(applied)
    return newest is None or outcome_is_true(newest, accepted, answered)


def durable_before_commit(committed: int, ended: Collection[int]) -> bool:
    """I5: the output of every record below a committed offset is in the next topic."""
    return all(offset in ended for offset in range(committed))


def right_outcome(version: Version, versions: Collection[Version], outcome: Outcome) -> bool:
    """I5: the first reported outcome of an event is the right one."""
    if not version.readable:
        return outcome in {Outcome.DEAD_LETTER, Outcome.SUPERSEDED}
    if version is winner(versions):
        return outcome is Outcome.DONE
    newer_before = any(one.readable and one.number >= version.number and one.place < version.place for one in versions)
    return outcome is Outcome.SUPERSEDED if newer_before else outcome in {Outcome.DONE, Outcome.SUPERSEDED}


def replay_is_harmless(before: Mapping[str, int], after: Mapping[str, int]) -> bool:
    """I6: a replay changes neither the searchable passages nor the versions that wrote them."""
    return before == after


def tenants_are_isolated(
    applied: Collection[Version], accepted: Collection[Version], groups: Collection[str], answered: Collection[str]
) -> bool:
    """I7: a reader receives only passages of versions that its tenant and groups may see.

    Args:
        applied: as in ``answer_is_current``. Versions older than the newest of them do not justify a passage.
        accepted: versions of the document in the tenant of the reader; none if it belongs to another tenant.
        groups: groups of the reader.
        answered: passages of the document in the answer.
    """
    newest = newest_of(applied)
    visible = accepted if newest is None else [newest, *_since(newest, accepted)]
    return frozenset(answered) <= frozenset[str]().union(*(one.passages for one in visible if one.may_be_seen(groups)))


def newest_of(versions: Iterable[Version]) -> Version | None:
    """The version with the highest number, of equal ones the first."""
    return max(versions, key=lambda one: one.number, default=None)


def _since(version: Version, accepted: Iterable[Version]) -> list[Version]:
    return [one for one in accepted if one.number > version.number and one.readable]
