"""A history of observations, evaluated against the invariants as they are recorded. Pure."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from freshline.verify import invariants
from freshline.verify.invariants import Version
from schemas.documents import DocumentKey, Outcome
from schemas.positions import Position

Passages = Mapping[str, int]
"""Passages of a document: id → version that wrote it."""


class Harm(StrEnum):
    """Effect of a violation."""

    LOST = "lost"
    STALE = "stale"
    RESURRECTED = "resurrected"
    LEAKED = "leaked"
    MISREPORTED = "misreported"


@dataclass(frozen=True, slots=True)
class Violation:
    """A violated invariant.

    Attributes:
        invariant: I1 to I7.
        what: the observation, as text.
    """

    invariant: str
    harm: Harm
    what: str

    def __str__(self) -> str:
        return f"{self.invariant} ({self.harm}): {self.what}"


class ObservedHistory:
    """A history of observations, in any order in which they can occur. Each is evaluated when it is recorded.

    Attributes:
        accepted: versions of each document, in any order.
        done: versions reported as done, in the order of the reports.
        outcomes: first reported outcome of each event.
        partitions: partition of each document.
        violations: all violations so far.
    """

    def __init__(self) -> None:
        self.accepted: dict[DocumentKey, list[Version]] = defaultdict(list)
        self.done: dict[DocumentKey, list[Version]] = defaultdict(list)
        self._superseded: dict[DocumentKey, list[Version]] = defaultdict(list)
        self.outcomes: dict[Position, Outcome] = {}
        self.violations: list[Violation] = []
        self._versions: dict[Position, tuple[DocumentKey, Version]] = {}
        self._given_up: list[Version] = []
        self._manifests: dict[DocumentKey, int] = {}
        self._assigned: dict[DocumentKey, int] = {}
        self.partitions: dict[DocumentKey, int] = {}

    def harms(self) -> Counter[Harm]:
        """Number of violations by harm."""
        return Counter(violation.harm for violation in self.violations)

    def accept(self, position: Position, key: DocumentKey, version: Version) -> None:
        """An event is in the stream."""
        self.accepted[key].append(version)
        self._versions[position] = (key, version)
        self.partitions[key] = position.partition

    def record_outcome(self, position: Position, outcome: Outcome, searchable: Passages | None = None) -> None:
        """An outcome is in the stream of index changes.

        Args:
            position: position of an accepted event.
            outcome: its outcome; only the first one counts.
            searchable: passages of its document at this instant, if known.
        """
        key, version = self._versions[position]
        first = self.outcomes.setdefault(position, outcome)
        if first is outcome is Outcome.SUPERSEDED:
            self._superseded[key].append(version)
        if outcome is not Outcome.DONE:
            return
        self.done[key].append(version)
        if searchable is not None and not invariants.outcome_is_true(version, self.accepted[key], searchable):
            self._violated(
                "I3", Harm.STALE, f"{key} {version} was reported as done, but {dict(searchable)} is searchable"
            )

    def gave_up(self, position: Position) -> None:
        """A readable version ended as a dead letter: from now on it counts as unreadable."""
        key, version = self._versions[position]
        if not version.readable:
            return
        unreadable = replace(version, readable=False)
        self._given_up.append(unreadable)
        self.accepted[key] = [unreadable if one is version else one for one in self.accepted[key]]
        self._versions[position] = (key, unreadable)

    def advanced(self, tenant: str, positions: Mapping[int, int], searchable: Mapping[DocumentKey, Passages]) -> None:
        """Positions stored in the index, and what was searchable at that instant."""
        for key in [key for key in searchable if key.tenant == tenant]:
            reached = [
                one
                for one in self.accepted[key]
                if one.readable and one.place <= positions.get(self.partitions[key], -1)
            ]
            if not invariants.never_missing(reached, self.accepted[key], searchable[key]):
                found = dict(searchable[key])
                self._violated("I4", Harm.STALE, f"the index has the positions {dict(positions)}, but {found} of {key}")

    def reached_the_end(self, tenant: str, positions: Mapping[int, int]) -> None:
        """Positions stored in the index after every event has ended."""
        for position, (key, version) in self._versions.items():
            if key.tenant == tenant and positions.get(position.partition, -1) < position.offset:
                self._violated("I4", Harm.LOST, f"{key} {version} at {position} is beyond {dict(positions)}")

    def done_so_far(self) -> dict[DocumentKey, tuple[Version, ...]]:
        """Versions that an index scan starting now must reflect."""
        return {key: tuple(versions) for key, versions in self.done.items()}

    def searchable(self, key: DocumentKey, passages: Passages, *, after: Collection[Version]) -> None:
        """Passages of a document were read from the index.

        Args:
            key: the document.
            passages: its searchable passages.
            after: versions reported as done before the scan started.
        """
        if not invariants.not_resurrected(after, passages):
            self._violated("I2", Harm.RESURRECTED, f"{key}: {dict(passages)} is searchable after {after}")
        if not invariants.never_missing(after, self.accepted[key], passages):
            self._violated("I3", Harm.LOST, f"{key}: only {dict(passages)} is searchable after {after}")

    def manifest(self, key: DocumentKey, version: int) -> None:
        """A manifest was read in real time."""
        if not invariants.versions_only_grow(self._manifests.get(key, -1), version):
            self._violated("I1", Harm.STALE, f"{key}: version decreased from {self._manifests[key]} to {version}")
        self._manifests[key] = version

    def manifest_lost(self, key: DocumentKey) -> None:
        """The manifest of a document was lost; only its passages remain."""
        self._manifests.pop(key, None)

    def committed(self, lane: str, offset: int, ended: Collection[int]) -> None:
        """A committed offset was read.

        Args:
            lane: group and partition, for messages.
            offset: next offset to read.
            ended: offsets whose outcome was durable by then.
        """
        if not invariants.durable_before_commit(offset, ended):
            incomplete = sorted(set(range(offset)).difference(ended))
            self._violated("I5", Harm.LOST, f"{lane} committed {offset} past {incomplete[:5]}, which are incomplete")

    def answered(
        self, as_of: Mapping[int, int], tenant: str, groups: Collection[str], key: DocumentKey, passages: Passages
    ) -> None:
        """An answer with these passages of a document was served to a reader with these groups."""
        versions_of_tenant = (
            [self._as_of(as_of, key, one) for one in self.accepted[key]] if key.tenant == tenant else []
        )
        applied = [one for one in self._applied(as_of, key) if one in versions_of_tenant]
        observation = f"answer as of {dict(as_of)} has {dict(passages)} of {key} after {applied}"
        if not invariants.tenants_are_isolated(applied, versions_of_tenant, groups, passages):
            # If the reader may see every version, the passage is not leaked but outdated.
            harm = (
                Harm.LEAKED
                if any(not one.may_be_seen(groups) for one in versions_of_tenant) or not versions_of_tenant
                else Harm.STALE
            )
            self._violated("I7" if harm is Harm.LEAKED else "I4", harm, observation)
        elif not invariants.answer_is_current(applied, versions_of_tenant, passages):
            self._violated("I4", Harm.STALE, observation)
        elif not invariants.never_mixed(versions_of_tenant, passages):
            self._violated(
                "I3", Harm.STALE, f"no single version of {versions_of_tenant} has all of these passages: {observation}"
            )
        # A superseded delete removed nothing: the version that superseded it may keep older passages.
        if not invariants.not_resurrected([one for one in self.done[key] if one in applied], passages):
            self._violated("I2", Harm.RESURRECTED, observation)

    def answered_whole(self, as_of: Mapping[int, int], key: DocumentKey, passages: Passages) -> None:
        """An answer that may contain all passages of a document was served to a reader who may see all of them."""
        applied = self._applied(as_of, key)
        if not invariants.never_missing(applied, self.accepted[key], passages):
            self._violated("I3", Harm.LOST, f"answer as of {dict(as_of)} has only {dict(passages)} of {key}")

    def rested(self, searchable: Mapping[DocumentKey, Passages]) -> None:
        """All events have completed, and exactly these passages are searchable."""
        for key in sorted(self.accepted.keys() | searchable.keys()):
            versions, found = self.accepted.get(key, []), frozenset(searchable.get(key, ()))
            if invariants.newer_wins(versions, found):
                continue
            expected = invariants.passages_at_rest(versions)
            if missing := expected - found:
                self._violated("I1", Harm.LOST, f"{key}: {sorted(missing)} is missing when idle after {versions}")
            if extra := found - expected:
                harm = Harm.STALE if expected else Harm.RESURRECTED
                self._violated("I1", harm, f"{key}: {sorted(extra)} is searchable when idle after {versions}")
        for position, (key, version) in self._versions.items():
            outcome = self.outcomes.get(position)
            if outcome is None:
                self._violated("I5", Harm.LOST, f"{key} {version} at {position} has no outcome")
            elif not invariants.right_outcome(version, self.accepted[key], outcome):
                versions = self.accepted[key]
                self._violated(
                    "I5", Harm.MISREPORTED, f"{key} {version} at {position} ended {outcome} among {versions}"
                )

    def replayed(self, before: Mapping[DocumentKey, Passages], after: Mapping[DocumentKey, Passages]) -> None:
        """Searchable passages before and after a replay of a part of the stream."""
        for key in sorted(before.keys() | after.keys()):
            old, new = before.get(key, {}), after.get(key, {})
            if not invariants.replay_is_harmless(old, new):
                harm = Harm.STALE if old else Harm.RESURRECTED
                self._violated("I6", harm, f"{key}: {dict(old)} became {dict(new)}")

    def assigned(self, key: DocumentKey, version: int) -> None:
        """A version was assigned to a document; in sending order."""
        before = self._assigned.get(key, -1)
        if not invariants.versions_only_grow(before + 1, version):
            self._violated("I1", Harm.STALE, f"{key} was assigned version {version} after version {before}")
        self._assigned[key] = version

    def outcome_reported_again(self, position: Position, outcome: Outcome) -> None:
        """The state of an event was read. It must have the first reported outcome."""
        if self.outcomes.get(position) is not outcome:
            self._violated(
                "I5", Harm.MISREPORTED, f"{position} ended {self.outcomes.get(position)}, but is reported as {outcome}"
            )

    def completion_reported(self, event_id: str, position: Position, applied: Mapping[int, int]) -> None:
        """A client was notified of the end of an event while cached answers had these positions."""
        if applied.get(position.partition, -1) < position.offset:
            self._violated("I4", Harm.STALE, f"the end of {event_id} at {position} was reported as of {dict(applied)}")

    def lost(self, what: str) -> None:
        """An acknowledged event is not in the stream, or differs there."""
        self._violated("I5", Harm.LOST, what)

    def _as_of(self, as_of: Mapping[int, int], key: DocumentKey, version: Version) -> Version:
        """Until it was given up, searches may have found what there was of it; not as of its position."""
        was_readable = any(one is version for one in self._given_up) and not self._reflects(as_of, key, version)
        return replace(version, readable=True) if was_readable else version

    def _applied(self, as_of: Mapping[int, int], key: DocumentKey) -> list[Version]:
        """Versions that an answer with these positions reflects: their own passages, or those of a newer version.

        A superseded version is among them, because a newer one replaced it. Of equal versions only the first counts.
        """
        numbers = Counter(one.number for one in self.accepted[key])
        superseded = [one for one in self._superseded[key] if numbers[one.number] == 1]
        return [one for one in (*self.done[key], *superseded) if self._reflects(as_of, key, one)]

    def _reflects(self, as_of: Mapping[int, int], key: DocumentKey, version: Version) -> bool:
        return as_of.get(self.partitions[key], -1) >= version.place

    def _violated(self, invariant: str, harm: Harm, what: str) -> None:
        self.violations.append(Violation(invariant, harm, what))
