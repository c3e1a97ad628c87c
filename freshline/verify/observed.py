"""What was seen of an installation so far, judged by the invariants as it is seen. Pure: nothing here asks anyone."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from freshline.verify import invariants
from freshline.verify.invariants import Version
from schemas.documents import DocumentKey, Outcome
from schemas.positions import Position

Passages = Mapping[str, int]
"""Passages of one document: id → version that wrote it."""


class Harm(StrEnum):
    """What a violation does to people."""

    LOST = "lost"
    STALE = "stale"
    RESURRECTED = "resurrected"
    LEAKED = "leaked"
    MISTOLD = "mistold"


@dataclass(frozen=True, slots=True)
class Violation:
    """An invariant that did not hold.

    Attributes:
        invariant: I1 to I7.
        what: the observation, for people.
    """

    invariant: str
    harm: Harm
    what: str

    def __str__(self) -> str:
        return f"{self.invariant} ({self.harm}): {self.what}"


class Observed:
    """A history. Observations may come in any order that could have been seen; each is judged when it comes.

    Attributes:
        accepted: versions of each document, in any order.
        done: versions told as done, in the order told.
        outcomes: how events ended, as first told.
        partitions: that documents are on.
        violations: whatever did not hold.
    """

    def __init__(self) -> None:
        self.accepted: dict[DocumentKey, list[Version]] = defaultdict(list)
        self.done: dict[DocumentKey, list[Version]] = defaultdict(list)
        self.outcomes: dict[Position, Outcome] = {}
        self.violations: list[Violation] = []
        self._places: dict[Position, tuple[DocumentKey, Version]] = {}
        self._given_up: list[Version] = []
        self._manifests: dict[DocumentKey, int] = {}
        self._assigned: dict[DocumentKey, int] = {}
        self.partitions: dict[DocumentKey, int] = {}

    def harms(self) -> Counter[Harm]:
        """How many violations did which harm."""
        return Counter(violation.harm for violation in self.violations)

    def accept(self, position: Position, key: DocumentKey, version: Version) -> None:
        """An event is in the stream."""
        self.accepted[key].append(version)
        self._places[position] = (key, version)
        self.partitions[key] = position.partition

    def told(self, position: Position, outcome: Outcome, searchable: Passages | None = None) -> None:
        """An outcome is in the stream of index changes.

        Args:
            position: of the event; it must have been accepted before.
            outcome: as told now; only the first counts.
            searchable: passages of its document at this very instant, where that can be known.
        """
        key, version = self._places[position]
        self.outcomes.setdefault(position, outcome)
        if outcome is not Outcome.DONE:
            return
        self.done[key].append(version)
        if searchable is not None and not invariants.told_is_true(version, self.accepted[key], searchable):
            self._violated("I3", Harm.STALE, f"{key} {version} was told, and {dict(searchable)} is searchable")

    def gave_up(self, position: Position) -> None:
        """A version ended as dead letter that could have been read: from now on it counts as one that could not."""
        key, version = self._places[position]
        if not version.readable:
            return
        unreadable = replace(version, readable=False)
        self._given_up.append(unreadable)
        self.accepted[key] = [unreadable if one is version else one for one in self.accepted[key]]
        self._places[position] = (key, unreadable)

    def advanced(self, tenant: str, positions: Mapping[int, int], searchable: Mapping[DocumentKey, Passages]) -> None:
        """What the index says of how far everything has ended, and what was searchable at that instant."""
        for key in [key for key in searchable if key.tenant == tenant]:
            reached = [
                one
                for one in self.accepted[key]
                if one.readable and one.place <= positions.get(self.partitions[key], -1)
            ]
            if not invariants.never_gone(reached, self.accepted[key], searchable[key]):
                found = dict(searchable[key])
                self._violated(
                    "I4", Harm.STALE, f"the index is told to be at {dict(positions)}, and has {found} of {key}"
                )

    def reached_the_end(self, tenant: str, positions: Mapping[int, int]) -> None:
        """Every event has ended, and this is how far the index says that everything has."""
        for position, (key, version) in self._places.items():
            if key.tenant == tenant and positions.get(position.partition, -1) < position.offset:
                self._violated("I4", Harm.LOST, f"{key} {version} at {position} is beyond {dict(positions)}")

    def done_so_far(self) -> dict[DocumentKey, tuple[Version, ...]]:
        """What a look at the index that begins now must respect."""
        return {key: tuple(versions) for key, versions in self.done.items()}

    def searchable(self, key: DocumentKey, passages: Passages, *, after: Collection[Version]) -> None:
        """Passages of a document were seen in the index.

        Args:
            key: the document.
            passages: what was seen.
            after: versions told as done before the look began.
        """
        if not invariants.not_resurrected(after, passages):
            self._violated("I2", Harm.RESURRECTED, f"{key}: {dict(passages)} is searchable after {after}")
        if not invariants.never_gone(after, self.accepted[key], passages):
            self._violated("I3", Harm.LOST, f"{key}: only {dict(passages)} is searchable after {after}")

    def manifest(self, key: DocumentKey, version: int) -> None:
        """A manifest was seen, in real time."""
        if not invariants.versions_only_grow(self._manifests.get(key, -1), version):
            self._violated("I1", Harm.STALE, f"{key} went back from version {self._manifests[key]} to {version}")
        self._manifests[key] = version

    def manifest_lost(self, key: DocumentKey) -> None:
        """Something else took a document's manifest away: of what stood, only its passages can tell from now on."""
        self._manifests.pop(key, None)

    def committed(self, lane: str, offset: int, ended: Collection[int]) -> None:
        """A group's offset was seen.

        Args:
            lane: group and partition, for people.
            offset: the next to read.
            ended: offsets of the lane whose outcome was durable by then.
        """
        if not invariants.durable_before_commit(offset, ended):
            open_ones = sorted(set(range(offset)).difference(ended))
            self._violated("I5", Harm.LOST, f"{lane} committed {offset} past {open_ones[:5]}, which have not ended")

    def answered(
        self, as_of: Mapping[int, int], tenant: str, groups: Collection[str], key: DocumentKey, passages: Passages
    ) -> None:
        """An answer was served to a reader of a tenant; what it holds of one document is to be judged."""
        mine = [self._as_of(as_of, key, one) for one in self.accepted[key]] if key.tenant == tenant else []
        applied = [one for one in self.done[key] if one in mine and self._covers(as_of, key, one)]
        claimed = f"answer as of {dict(as_of)} has {dict(passages)} of {key} after {applied}"
        if not invariants.tenants_never_meet(applied, mine, groups, passages):
            # For a reader who may see everything, what may not be seen any more is old.
            harm = Harm.LEAKED if any(not one.may_be_seen(groups) for one in mine) or not mine else Harm.STALE
            self._violated("I7" if harm is Harm.LEAKED else "I4", harm, claimed)
        elif not invariants.answer_is_current(applied, mine, passages):
            self._violated("I4", Harm.STALE, claimed)
        elif not invariants.never_mixed(mine, passages):
            self._violated("I3", Harm.STALE, f"no single version of {mine} has all of this: {claimed}")
        if not invariants.not_resurrected(applied, passages):
            self._violated("I2", Harm.RESURRECTED, claimed)

    def answered_whole(self, as_of: Mapping[int, int], key: DocumentKey, passages: Passages) -> None:
        """An answer had room for everything that there is of a document, and its reader may see all of it."""
        applied = [one for one in self.done[key] if self._covers(as_of, key, one)]
        if not invariants.never_gone(applied, self.accepted[key], passages):
            self._violated("I3", Harm.LOST, f"answer as of {dict(as_of)} has only {dict(passages)} of {key}")

    def rested(self, searchable: Mapping[DocumentKey, Passages]) -> None:
        """Every event has ended; this is all that is searchable."""
        for key in sorted(self.accepted.keys() | searchable.keys()):
            versions, found = self.accepted.get(key, []), frozenset(searchable.get(key, ()))
            if invariants.newer_wins(versions, found):
                continue
            wanted = invariants.passages_at_rest(versions)
            if missing := wanted - found:
                self._violated("I1", Harm.LOST, f"{key}: {sorted(missing)} is missing at rest after {versions}")
            if extra := found - wanted:
                harm = Harm.STALE if wanted else Harm.RESURRECTED
                self._violated("I1", harm, f"{key}: {sorted(extra)} is searchable at rest after {versions}")
        for position, (key, version) in self._places.items():
            outcome = self.outcomes.get(position)
            if outcome is None:
                self._violated("I5", Harm.LOST, f"{key} {version} at {position} has no outcome")
            elif not invariants.right_outcome(version, self.accepted[key], outcome):
                versions = self.accepted[key]
                self._violated("I5", Harm.MISTOLD, f"{key} {version} at {position} ended {outcome} among {versions}")

    def replayed(self, before: Mapping[DocumentKey, Passages], after: Mapping[DocumentKey, Passages]) -> None:
        """A part of the log was read again; what was searchable before and after."""
        for key in sorted(before.keys() | after.keys()):
            was, now = before.get(key, {}), after.get(key, {})
            if not invariants.replay_is_harmless(was, now):
                harm = Harm.STALE if was else Harm.RESURRECTED
                self._violated("I6", harm, f"{key}: {dict(was)} became {dict(now)}")

    def assigned(self, key: DocumentKey, version: int) -> None:
        """A version was assigned to a document; in the order of its sending."""
        before = self._assigned.get(key, -1)
        if not invariants.versions_only_grow(before + 1, version):
            self._violated("I1", Harm.STALE, f"{key} got version {version} after version {before}")
        self._assigned[key] = version

    def told_again(self, position: Position, outcome: Outcome) -> None:
        """The state of an event was seen: it tells what was told first."""
        if self.outcomes.get(position) is not outcome:
            self._violated("I5", Harm.MISTOLD, f"{position} ended {self.outcomes.get(position)}, and is told {outcome}")

    def told_of_end(self, event_id: str, position: Position, applied: Mapping[int, int]) -> None:
        """Somebody was told that an event has ended, while cached answers had these positions."""
        if applied.get(position.partition, -1) < position.offset:
            self._violated("I4", Harm.STALE, f"the end of {event_id} at {position} was told as of {dict(applied)}")

    def lost(self, what: str) -> None:
        """An event was promised and is not in the stream, or is there as another."""
        self._violated("I5", Harm.LOST, what)

    def _as_of(self, as_of: Mapping[int, int], key: DocumentKey, version: Version) -> Version:
        """Until it was given up, searches may have found what there was of it; not as of its position."""
        was_readable = any(one is version for one in self._given_up) and not self._covers(as_of, key, version)
        return replace(version, readable=True) if was_readable else version

    def _covers(self, as_of: Mapping[int, int], key: DocumentKey, version: Version) -> bool:
        return as_of.get(self.partitions[key], -1) >= version.place

    def _violated(self, invariant: str, harm: Harm, what: str) -> None:
        self.violations.append(Violation(invariant, harm, what))
