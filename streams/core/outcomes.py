"""Outcomes of a record. The runner acts on them."""

from dataclasses import dataclass, replace
from typing import Final

from schemas.records import Record


@dataclass(frozen=True, slots=True)
class Finished:
    """The step has processed the record.

    Attributes:
        emit: records to produce durably before the record is acknowledged.
    """

    emit: tuple[Record, ...] = ()

    def followed_by(self, *records: Record) -> "Finished":
        """The same outcome with additional records to produce."""
        return replace(self, emit=(*self.emit, *records))


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """The step gives up the record permanently.

    Attributes:
        kind: short stable name of the failure.
        reason: for operators and users.
        emit: records that report the dead letter to the next step, so that positions and event states include every
            event.
    """

    kind: str
    reason: str
    emit: tuple[Record, ...] = ()

    def followed_by(self, *records: Record) -> "DeadLetter":
        """The same outcome with additional records to produce."""
        return replace(self, emit=(*self.emit, *records))


Outcome = Finished | DeadLetter

SYSTEMIC_KINDS: Final = frozenset({"content-lost", "failed", "refused", "undecodable"})
"""Kinds that a faulty deployment causes for every record. The other kinds depend on documents, and have no limit."""
