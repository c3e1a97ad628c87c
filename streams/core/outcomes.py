"""Outcomes of a record. The runner acts on them."""

from dataclasses import dataclass
from typing import Final

from schemas.records import Record


@dataclass(frozen=True, slots=True)
class Finished:
    """The step has processed the record.

    Attributes:
        emit: records to produce durably before the record is acknowledged.
    """

    emit: tuple[Record, ...] = ()


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


Outcome = Finished | DeadLetter

SYSTEMIC_KINDS: Final = frozenset({"content-lost", "failed", "refused", "undecodable"})
"""Kinds that a faulty deployment causes for every record. The other kinds depend on documents, and have no limit."""
