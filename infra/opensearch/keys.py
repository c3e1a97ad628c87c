"""API keys in an index of their own: as durable as the index, and readable by every process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from opensearchpy import AsyncOpenSearch
from opensearchpy.exceptions import ConflictError, NotFoundError
from typing_extensions import override

from infra.credentials.port import CredentialsUnavailable, KeyStore
from infra.opensearch.client import unavailable_is_said
from infra.opensearch.port import IndexUnavailable
from schemas.credentials import ApiKey
from schemas.names import Names

_PAGE: Final = 1_000
_NO_INDEX: Final = "index_not_found_exception"


class OpenSearchKeys(KeyStore):
    """See ``KeyStore``. An index that is not there yet holds no keys.

    Args:
        client: of the cluster; stays the caller's.
        names: of this installation.
    """

    def __init__(self, client: AsyncOpenSearch, names: Names) -> None:
        self._client = client
        self._index = names.keys_index

    @override
    async def add(self, key: ApiKey) -> None:
        with _unavailable_is_said():
            await self._client.create(index=self._index, id=key.key_id, body=_body(key), params={"refresh": "true"})

    @override
    async def change(self, key_id: str, change: Callable[[ApiKey], ApiKey]) -> ApiKey | None:
        with _unavailable_is_said():
            while True:
                try:
                    found = await self._client.get(index=self._index, id=key_id)
                except NotFoundError:
                    return None
                changed = change(_read(found["_source"]))
                unchanged_since = {"if_seq_no": found["_seq_no"], "if_primary_term": found["_primary_term"]}
                try:
                    await self._client.index(
                        index=self._index, id=key_id, body=_body(changed), params=unchanged_since | {"refresh": "true"}
                    )
                except ConflictError:  # another process was first: begin with what it wrote
                    continue
                return changed

    @override
    async def keys(self) -> Sequence[ApiKey]:
        found: list[ApiKey] = []
        body: dict[str, Any] = {"size": _PAGE, "sort": ["created_ms", "key_id"]}
        with _unavailable_is_said():
            while True:
                try:
                    answer = await self._client.search(
                        index=self._index, body=body, params={"allow_partial_search_results": "false"}
                    )
                except NotFoundError as error:
                    if error.error != _NO_INDEX:
                        raise
                    return []
                hits = answer["hits"]["hits"]
                found += [_read(hit["_source"]) for hit in hits]
                if len(hits) < _PAGE:
                    return found
                body = body | {"search_after": hits[-1]["sort"]}


@contextmanager
def _unavailable_is_said() -> Iterator[None]:
    try:
        with unavailable_is_said():
            yield
    except IndexUnavailable as error:
        raise CredentialsUnavailable(str(error)) from error


def _body(key: ApiKey) -> dict[str, Any]:
    return {"key_id": key.key_id, "created_ms": key.created_ms, "key": key.model_dump(mode="json")}


def _read(source: dict[str, Any]) -> ApiKey:
    return ApiKey.model_validate(source["key"])
