"""API keys in an OpenSearch index."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from opensearchpy import AsyncOpenSearch
from opensearchpy.exceptions import ConflictError, NotFoundError
from typing_extensions import override

from infra.credentials.port import CredentialsUnavailable, KeyStore
from infra.opensearch.client import opensearch_errors
from infra.opensearch.port import IndexUnavailable
from schemas.credentials import ApiKey
from schemas.names import Names

_PAGE: Final = 1_000
_NO_INDEX: Final = "index_not_found_exception"


class OpenSearchKeys(KeyStore):
    """API keys in an OpenSearch index. A missing index contains no keys.

    Args:
        client: client of the cluster; closed by the caller.
        names: names of the installation.
    """

    def __init__(self, client: AsyncOpenSearch, names: Names) -> None:
        self._client = client
        self._index = names.keys_index

    @override
    async def add(self, key: ApiKey) -> None:
        with _store_errors():
            await self._client.create(index=self._index, id=key.key_id, body=_body(key), params={"refresh": "true"})

    @override
    async def change(self, key_id: str, change: Callable[[ApiKey], ApiKey]) -> ApiKey | None:
        with _store_errors():
            while True:
                try:
                    stored = await self._client.get(index=self._index, id=key_id)
                except NotFoundError:
                    return None
                changed = change(_read(stored["_source"]))
                precondition = {"if_seq_no": stored["_seq_no"], "if_primary_term": stored["_primary_term"]}
                try:
                    await self._client.index(
                        index=self._index, id=key_id, body=_body(changed), params=precondition | {"refresh": "true"}
                    )
                except ConflictError:  # another process changed it: read again
                    continue
                return changed

    @override
    async def keys(self) -> Sequence[ApiKey]:
        found: list[ApiKey] = []
        body: dict[str, Any] = {"size": _PAGE, "sort": ["created_ms", "key_id"]}
        with _store_errors():
            while True:
                try:
                    response = await self._client.search(
                        index=self._index, body=body, params={"allow_partial_search_results": "false"}
                    )
                except NotFoundError as error:
                    if error.error != _NO_INDEX:
                        raise
                    return []
                hits = response["hits"]["hits"]
                found += [_read(hit["_source"]) for hit in hits]
                if len(hits) < _PAGE:
                    return found
                body = body | {"search_after": hits[-1]["sort"]}


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        with opensearch_errors():
            yield
    except IndexUnavailable as error:
        raise CredentialsUnavailable(str(error)) from error


def _body(key: ApiKey) -> dict[str, Any]:
    return {"key_id": key.key_id, "created_ms": key.created_ms, "key": key.model_dump(mode="json")}


def _read(source: dict[str, Any]) -> ApiKey:
    return ApiKey.model_validate(source["key"])
