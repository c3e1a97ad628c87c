"""Every name that lives in an outside system, derived from one namespace.

Two installations (a test run and a demo, say) share the same servers without meeting by using two namespaces.
"""

import re
from dataclasses import dataclass
from typing import Final

NAMESPACE_PATTERN: Final = re.compile(r"[a-z][a-z0-9-]{0,39}")
"""Lower case because OpenSearch index names are."""

_INDEX: Final = re.compile(r"(?:chunks|manifests)-g[0-9]{1,6}|vectors|keys|webhooks(?:-waiting)?")
"""What follows the namespace in the name of an index."""


@dataclass(frozen=True, slots=True)
class Names:
    """Names of topics, consumer groups, indices and Redis keys.

    Attributes:
        namespace: prefix of everything; matches ``NAMESPACE_PATTERN``.
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
        """Physical chunk index of one generation."""
        return f"{self.namespace}-chunks-{generation}"

    def manifests_index(self, generation: str) -> str:
        """Physical manifest index of one generation."""
        return f"{self.namespace}-manifests-{generation}"

    @property
    def vectors_index(self) -> str:
        """Index of stored vectors, shared by all generations: a vector depends on text and model only."""
        return f"{self.namespace}-vectors"

    @property
    def keys_index(self) -> str:
        """Index of API keys; no generation has any of its own."""
        return f"{self.namespace}-keys"

    @property
    def webhooks_index(self) -> str:
        """Index of webhooks."""
        return f"{self.namespace}-webhooks"

    @property
    def waiting_index(self) -> str:
        """Index of the webhooks' messages that wait to be sent again."""
        return f"{self.namespace}-webhooks-waiting"

    def owns_index(self, name: str) -> bool:
        """Whether an index is of this namespace: another may be named by it and more, such as ``freshline-test``."""
        return name.startswith(f"{self.namespace}-") and bool(_INDEX.fullmatch(name, len(self.namespace) + 1))

    @property
    def chunks_alias(self) -> str:
        """Alias of the chunk index that serves queries."""
        return f"{self.namespace}-chunks"

    def tenant_slice(self, tenant: str) -> str:
        """Redis key prefix of one tenant; the braces keep all of it in one cluster slot, so one Lua call can see it."""
        return f"{self.namespace}:{{{tenant}}}"

    def answer_slice(self, tenant: str, number: int) -> str:
        """Redis key prefix of one slice of a tenant's answers; each has a cluster slot of its own."""
        return f"{self.namespace}:{{{tenant}/{number}}}"

    @property
    def applied_channel(self) -> str:
        """Redis pub/sub channel on which invalidation announces what it has applied."""
        return f"{self.namespace}:applied"
