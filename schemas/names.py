"""Names in external systems, derived from a namespace.

Installations with different namespaces, such as a test run and a demo, can share servers.
"""

import re
from dataclasses import dataclass
from typing import Final

NAMESPACE_PATTERN: Final = re.compile(r"[a-z][a-z0-9-]{0,39}")
"""Lower case, as required for OpenSearch index names."""

_INDEX: Final = re.compile(r"(?:chunks|manifests)-g[0-9]{1,6}|vectors|keys|webhooks(?:-waiting)?")
"""Index names after the namespace."""


@dataclass(frozen=True, slots=True)
class Names:
    """Names of topics, consumer groups, indices and Redis keys.

    Attributes:
        namespace: prefix of all names; matches ``NAMESPACE_PATTERN``.
    """

    namespace: str = "freshline"

    def __post_init__(self) -> None:
        if not NAMESPACE_PATTERN.fullmatch(self.namespace):
            raise ValueError(f"namespace {self.namespace!r} must match {NAMESPACE_PATTERN.pattern}")

    def topic(self, topic: str) -> str:
        """Kafka name of a logical topic such as ``documents.v1``."""
        return f"{self.namespace}.{topic}"

    def group(self, step: str) -> str:
        """Consumer group of a processing step such as ``prepare``."""
        return f"{self.namespace}.{step}"

    def chunks_index(self, generation: str) -> str:
        """Physical chunk index of a generation."""
        return f"{self.namespace}-chunks-{generation}"

    def manifests_index(self, generation: str) -> str:
        """Physical manifest index of a generation."""
        return f"{self.namespace}-manifests-{generation}"

    @property
    def vectors_index(self) -> str:
        """Index of vectors, shared by all generations: a vector depends on text and model only."""
        return f"{self.namespace}-vectors"

    @property
    def keys_index(self) -> str:
        """Index of API keys, shared by all generations."""
        return f"{self.namespace}-keys"

    @property
    def webhooks_index(self) -> str:
        """Index of webhooks."""
        return f"{self.namespace}-webhooks"

    @property
    def waiting_index(self) -> str:
        """Index of webhook messages that wait for a retry."""
        return f"{self.namespace}-webhooks-waiting"

    def owns_index(self, name: str) -> bool:
        """Whether an index is of this namespace, not of one with the same prefix such as ``freshline-test``."""
        return name.startswith(f"{self.namespace}-") and bool(_INDEX.fullmatch(name, len(self.namespace) + 1))

    @property
    def chunks_alias(self) -> str:
        """Alias of the chunk index that serves queries."""
        return f"{self.namespace}-chunks"

    def tenant_slice(self, tenant: str) -> str:
        """Redis key prefix of a tenant. The hash tag maps its keys to one cluster slot, as Lua scripts require."""
        return f"{self.namespace}:{{{tenant}}}"

    def answer_slice(self, tenant: str, number: int) -> str:
        """Redis key prefix of a slice of a tenant's answers. Each slice has its own hash tag."""
        return f"{self.namespace}:{{{tenant}/{number}}}"

    @property
    def applied_channel(self) -> str:
        """Redis pub/sub channel of invalidation messages."""
        return f"{self.namespace}:applied"
