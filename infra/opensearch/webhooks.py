"""Webhooks and the messages that wait for them, each in an index of its own: as durable as the index."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from opensearchpy import AsyncOpenSearch
from opensearchpy.exceptions import ConflictError, NotFoundError
from typing_extensions import override

from infra.opensearch.client import unavailable_is_said
from infra.opensearch.port import IndexUnavailable
from infra.webhooks.port import WebhookStore
from schemas.names import Names
from schemas.webhooks import KeptWebhook, WaitingMessage

_MOST: Final = 10_000
"""What one search can return, and more webhooks than one worker could serve."""

_NO_INDEX: Final = "index_not_found_exception"
_WHOLE: Final = {"allow_partial_search_results": "false"}


class OpenSearchWebhooks(WebhookStore):
    """See ``WebhookStore``. An index that is not there yet holds nothing.

    Args:
        client: of the cluster; stays the caller's.
        names: of this installation.
    """

    def __init__(self, client: AsyncOpenSearch, names: Names) -> None:
        self._client = client
        self._index = names.webhooks_index
        self._waiting = names.waiting_index

    @override
    async def add(self, webhook: KeptWebhook) -> None:
        with unavailable_is_said():
            await self._client.create(
                index=self._index, id=webhook.webhook_id, body=_body(webhook), params={"refresh": "true"}
            )

    @override
    async def change(self, webhook_id: str, change: Callable[[KeptWebhook], KeptWebhook | None]) -> KeptWebhook | None:
        while True:
            try:
                with unavailable_is_said():
                    found = await self._client.get(index=self._index, id=webhook_id)
                    changed = change(KeptWebhook.model_validate(found["_source"]["webhook"]))
                    if changed is None:
                        return None
                    unchanged_since = {"if_seq_no": found["_seq_no"], "if_primary_term": found["_primary_term"]}
                    await self._client.index(
                        index=self._index,
                        id=webhook_id,
                        body=_body(changed),
                        params=unchanged_since | {"refresh": "true"},
                    )
            except NotFoundError:
                return None
            except ConflictError:  # another process was first: begin with what it wrote
                continue
            return changed

    @override
    async def remove(self, webhook_id: str) -> None:
        """See ``WebhookStore``. What was kept for it meanwhile is removed by whoever finds it."""
        with unavailable_is_said():
            await self._client.delete(index=self._index, id=webhook_id, params={"refresh": "true", "ignore": 404})
        while messages := await self.oldest(webhook_id, _MOST):
            await self.forget(messages)

    @override
    async def webhooks(self) -> Sequence[KeptWebhook]:
        body = {"size": _MOST, "sort": ["created_ms", "webhook_id"]}
        hits = await self._found(self._index, body)
        return [KeptWebhook.model_validate(hit["_source"]["webhook"]) for hit in hits["hits"]["hits"]]

    @override
    async def keep(self, messages: Sequence[WaitingMessage]) -> None:
        lines: list[dict[str, Any]] = []
        for one in messages:
            lines += [{"create": {"_id": _place(one)}}, one.model_dump(mode="json")]
        # A conflict says that it waits already.
        await self._bulk(lines, accepted=(201, 409), refresh="false")

    @override
    async def waiting(self) -> Mapping[str, int]:
        body = {"size": 0, "aggs": {"webhooks": {"terms": {"field": "webhook_id", "size": _MOST}}}}
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
        lines: list[dict[str, Any]] = [{"delete": {"_id": _place(one)}} for one in messages]
        await self._bulk(lines, accepted=(200, 404), refresh="true")

    async def _found(self, index: str, body: Mapping[str, Any]) -> Any:
        try:
            with unavailable_is_said():
                return await self._client.search(index=index, body=body, params=_WHOLE)
        except IndexUnavailable as error:
            if getattr(error.__cause__, "error", None) == _NO_INDEX:
                return {"hits": {"hits": ()}}
            raise

    async def _bulk(self, lines: Sequence[Mapping[str, Any]], *, accepted: Sequence[int], refresh: str) -> None:
        if not lines:
            return
        with unavailable_is_said():
            answer = await self._client.bulk(index=self._waiting, body=lines, params={"refresh": refresh})
        for item in answer["items"]:
            [one] = item.values()
            if one["status"] not in accepted:
                raise IndexUnavailable(f"OpenSearch answered {one['status']} to a message of a webhook")


def _place(message: WaitingMessage) -> str:
    return f"{message.webhook_id}:{message.message_id}"


def _body(webhook: KeptWebhook) -> dict[str, Any]:
    return {
        "webhook_id": webhook.webhook_id,
        "created_ms": webhook.created_ms,
        "webhook": webhook.model_dump(mode="json"),
    }
