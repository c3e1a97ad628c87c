"""Where the answers of a tenant lie in Redis."""

from dataclasses import dataclass

from schemas.names import Names


@dataclass(frozen=True, slots=True)
class AnswerKeys:
    """Redis keys of one tenant's slice. All share its hash tag, so one script may touch any of them on a cluster.

    Attributes:
        slice_key: ``Names.tenant_slice`` of the tenant.
    """

    slice_key: str

    @classmethod
    def of(cls, names: Names, tenant: str) -> "AnswerKeys":
        """Keys of ``tenant`` in this installation."""
        return cls(names.tenant_slice(tenant))

    @property
    def state(self) -> str:
        """A hash of ``epoch``, ``seeded`` and one field for each partition, holding the last offset applied.

        One key on purpose: Redis can lose all of it, never a part of it.
        """
        return f"{self.slice_key}:state"

    def answer(self, key: str) -> str:
        """A hash of ``epoch`` and ``entry``; it ends by itself."""
        return f"{self.slice_key}:answer:{key}"
