"""How a step can end with one record. The runner acts on it, once, in one place."""

from dataclasses import dataclass
from typing import Final

from schemas.records import Record


@dataclass(frozen=True, slots=True)
class Finished:
    """The step is through with the record.

    Attributes:
        emit: records to produce, durably, before the record counts as finished.
    """

    emit: tuple[Record, ...] = ()


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """The step gives up on the record for good.

    Attributes:
        reason: for people.
        kind: short stable name of the failure.
        emit: records that carry the news onward, so that watermarks and event states see every event end.
    """

    kind: str
    reason: str
    emit: tuple[Record, ...] = ()


Outcome = Finished | DeadLetter

MAYBE_OUR_FAULT: Final = frozenset({"content-lost", "failed", "refused", "undecodable"})
"""Kinds that a wrong deployment gives to every record. The others tell of documents: any number of them may be sent."""
