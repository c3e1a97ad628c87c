"""API keys in this process: the in-memory twin."""

from collections.abc import Callable, Sequence

from infra.credentials.port import CredentialsUnavailable
from schemas.credentials import ApiKey


class MemoryKeys:
    """See ``KeyStore``.

    Attributes:
        available: while False, every method raises ``CredentialsUnavailable``.
    """

    def __init__(self) -> None:
        self.available = True
        self._keys: dict[str, ApiKey] = {}

    async def add(self, key: ApiKey) -> None:
        """See ``KeyStore``."""
        self._check_available()
        self._keys[key.key_id] = key

    async def change(self, key_id: str, change: Callable[[ApiKey], ApiKey]) -> ApiKey | None:
        """See ``KeyStore``."""
        self._check_available()
        if key_id not in self._keys:
            return None
        self._keys[key_id] = change(self._keys[key_id])
        return self._keys[key_id]

    async def keys(self) -> Sequence[ApiKey]:
        """See ``KeyStore``."""
        self._check_available()
        return sorted(self._keys.values(), key=lambda key: (key.created_ms, key.key_id))

    def _check_available(self) -> None:
        if not self.available:
            raise CredentialsUnavailable("switched off")
