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
        """Hash with the applied positions and all sequence numbers of the slice.

        ``positions``: last applied offset of each partition; ``seeded``: no position is missing; ``epoch``: number of
        the last change; ``evaluated``: epoch up to which answers are evaluated; ``pending``: number of later changes;
        ``floor``: answers of earlier epochs are invalid; ``fills``: number of the last stored answer; ``sequence``:
        number of the last invalidation message. It is a single key so that Redis can lose all of it, but never a part.
        """
        return f"{self.slice_key}:state"

    @property
    def changes(self) -> str:
        """Stream of the latest changes by epoch. Each contains the preceding epoch, so that gaps are detected."""
        return f"{self.slice_key}:changes"

    @property
    def fills(self) -> str:
        """Stream of the stored answers by fill number."""
        return f"{self.slice_key}:fills"

    @property
    def drops(self) -> str:
        """Stream of the latest evictions: ``keys`` of the answers, or ``*``, and the ``reason``."""
        return f"{self.slice_key}:drops"

    @property
    def answers(self) -> str:
        """Prefix of the keys of all answers."""
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
