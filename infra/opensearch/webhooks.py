"""Webhooks and their waiting messages in two OpenSearch indices."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from opensearchpy import AsyncOpenSearch
from opensearchpy.exceptions import ConflictError, NotFoundError
from typing_extensions import override

from infra.opensearch.client import opensearch_errors
from infra.opensearch.port import IndexUnavailable
from infra.webhooks.port import WebhookStore
from schemas.names import Names
from schemas.webhooks import KeptWebhook, WaitingMessage

_MAX_RESULTS: Final = 10_000
"""Maximum number of hits per search, and more webhooks than one worker could serve."""

_NO_INDEX: Final = "index_not_found_exception"
_ALL_SHARDS: Final = {"allow_partial_search_results": "false"}


class OpenSearchWebhooks(WebhookStore):
    """Webhooks in OpenSearch. A missing index is empty.

    Args:
        client: client of the cluster; closed by the caller.
        names: names of the installation.
    """

    def __init__(self, client: AsyncOpenSearch, names: Names) -> None:
        self._client = client
        self._index = names.webhooks_index
        self._waiting = names.waiting_index

    @override
    async def add(self, webhook: KeptWebhook) -> None:
        with opensearch_errors():
            await self._client.create(
                index=self._index, id=webhook.webhook_id, body=_body(webhook), params={"refresh": "true"}
            )

    @override
    async def change(self, webhook_id: str, change: Callable[[KeptWebhook], KeptWebhook | None]) -> KeptWebhook | None:
        while True:
            try:
                with opensearch_errors():
                    found = await self._client.get(index=self._index, id=webhook_id)
                    changed = change(KeptWebhook.model_validate(found["_source"]["webhook"]))
                    if changed is None:
                        return None
                    precondition = {"if_seq_no": found["_seq_no"], "if_primary_term": found["_primary_term"]}
                    await self._client.index(
                        index=self._index,
                        id=webhook_id,
                        body=_body(changed),
                        params=precondition | {"refresh": "true"},
                    )
            except NotFoundError:
                return None
            except ConflictError:  # another process changed it: read again
                continue
            return changed

    @override
    async def remove(self, webhook_id: str) -> None:
        # Messages that are stored meanwhile are removed when they are read.
        with opensearch_errors():
            await self._client.delete(index=self._index, id=webhook_id, params={"refresh": "true", "ignore": 404})
        while messages := await self.oldest(webhook_id, _MAX_RESULTS):
            await self.forget(messages)

    @override
    async def webhooks(self) -> Sequence[KeptWebhook]:
        body = {"size": _MAX_RESULTS, "sort": ["created_ms", "webhook_id"]}
        hits = await self._found(self._index, body)
        return [KeptWebhook.model_validate(hit["_source"]["webhook"]) for hit in hits["hits"]["hits"]]

    @override
    async def keep(self, messages: Sequence[WaitingMessage]) -> None:
        lines: list[dict[str, Any]] = []
        for one in messages:
            lines += [{"create": {"_id": _message_id(one)}}, one.model_dump(mode="json")]
        # A conflict means that the message is stored already.
        await self._bulk(lines, accepted=(201, 409), refresh="false")

    @override
    async def waiting(self) -> Mapping[str, int]:
        body = {"size": 0, "aggs": {"webhooks": {"terms": {"field": "webhook_id", "size": _MAX_RESULTS}}}}
        found = await self._found(self._waiting, body)
        buckets = found.get("aggregations", {}).get("webhooks", {}).get("buckets", ())
        return {bucket["key"]: bucket["doc_count"] for bucket in buckets}

    @override
    async def oldest(self, webhook_id: str, limit: int) -> Sequence[WaitingMessage]:
        body = {
            "size": limit,
            "query": {"term": {"webhook_id": webhook_id}},
            "sort": ["ended_ms", "message_id"],
        }
        found = await self._found(self._waiting, body)
        return [WaitingMessage.model_validate(hit["_source"]) for hit in found["hits"]["hits"]]

    @override
    async def forget(self, messages: Sequence[WaitingMessage]) -> None:
        lines: list[dict[str, Any]] = [{"delete": {"_id": _message_id(one)}} for one in messages]
        await self._bulk(lines, accepted=(200, 404), refresh="true")

    async def _found(self, index: str, body: Mapping[str, Any]) -> Any:
        try:
            with opensearch_errors():
                return await self._client.search(index=index, body=body, params=_ALL_SHARDS)
        except IndexUnavailable as error:
            if getattr(error.__cause__, "error", None) == _NO_INDEX:
                return {"hits": {"hits": ()}}
            raise

    async def _bulk(self, lines: Sequence[Mapping[str, Any]], *, accepted: Sequence[int], refresh: str) -> None:
        if not lines:
            return
        with opensearch_errors():
            answer = await self._client.bulk(index=self._waiting, body=lines, params={"refresh": refresh})
        for item in answer["items"]:
            [one] = item.values()
            if one["status"] not in accepted:
                raise IndexUnavailable(f"OpenSearch responded with {one['status']} to a webhook message")


def _message_id(message: WaitingMessage) -> str:
    return f"{message.webhook_id}:{message.message_id}"


def _body(webhook: KeptWebhook) -> dict[str, Any]:
    return {
        "webhook_id": webhook.webhook_id,
        "created_ms": webhook.created_ms,
        "webhook": webhook.model_dump(mode="json"),
    }
