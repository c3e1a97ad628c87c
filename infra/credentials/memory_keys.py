"""In-memory store of API keys, for tests."""

from collections.abc import Callable, Sequence

from typing_extensions import override

from infra.credentials.port import CredentialsUnavailable, KeyStore
from schemas.credentials import ApiKey


class MemoryKeys(KeyStore):
    """In-memory store of API keys.

    Attributes:
        available: while False, every method raises ``CredentialsUnavailable``.
    """

    def __init__(self) -> None:
        self.available = True
        self._keys: dict[str, ApiKey] = {}

    @override
    async def add(self, key: ApiKey) -> None:
        self._check_available()
        self._keys[key.key_id] = key

    @override
    async def change(self, key_id: str, change: Callable[[ApiKey], ApiKey]) -> ApiKey | None:
        self._check_available()
        if key_id not in self._keys:
            return None
        self._keys[key_id] = change(self._keys[key_id])
        return self._keys[key_id]

    @override
    async def keys(self) -> Sequence[ApiKey]:
        self._check_available()
        return sorted(self._keys.values(), key=lambda key: (key.created_ms, key.key_id))

    def _check_available(self) -> None:
        if not self.available:
            raise CredentialsUnavailable("the store was made unavailable")
