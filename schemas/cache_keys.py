"""Where the answers of a tenant lie in Redis."""

from dataclasses import dataclass
from typing import Final
from zlib import crc32

from schemas.names import Names


@dataclass(frozen=True, slots=True)
class AnswerKeys:
    """Redis keys of one slice of a tenant. All share its hash tag, so one script may touch any of them on a cluster.

    Attributes:
        slice_key: ``Names.answer_slice`` of tenant and slice.
    """

    slice_key: str

    @classmethod
    def of(cls, names: Names, tenant: str, number: int = 0) -> "AnswerKeys":
        """Keys of a slice of ``tenant`` in this installation."""
        return cls(names.answer_slice(tenant, number))

    @property
    def state(self) -> str:
        """A hash: what is applied, and the numbers that order everything.

        ``positions``: the last offset applied of each partition; ``whole``: none is missing; ``epoch``: of the last
        change; ``judged``: of the last change that answers were judged by; ``floor``: answers of earlier epochs do not
        count; ``fills``: number of the last answer stored; ``told``: number of the last announcement. One key on
        purpose: Redis can lose all of it, never a part of it.
        """
        return f"{self.slice_key}:state"

    @property
    def changes(self) -> str:
        """A stream of the latest changes; the id is the epoch. Each names the epoch before it, so that gaps show."""
        return f"{self.slice_key}:changes"

    @property
    def fills(self) -> str:
        """A stream of the answers that are there; the id is the number of the fill."""
        return f"{self.slice_key}:fills"

    @property
    def drops(self) -> str:
        """A stream of the latest drops: ``keys`` of the answers, or ``*``, and ``why``."""
        return f"{self.slice_key}:drops"

    @property
    def answers(self) -> str:
        """What the keys of all answers begin with."""
        return f"{self.slice_key}:answer:"

    def answer(self, key: str) -> str:
        """Hash of ``epoch``, ``fill``, ``entry`` and ``evidence``; expires."""
        return f"{self.answers}{key}"

    def lease(self, key: str) -> str:
        """Fill lease of the answer; expires."""
        return f"{self.slice_key}:lease:{key}"


def slice_of(key: str, slices: int) -> int:
    """The slice that an answer belongs to."""
    return crc32(key.encode()) % slices


ENTRY_VERSION: Final = 6
"""Part of every cache key, so that processes of two releases never read each other's entries."""
