"""Dry run of an edit against the stores of a running installation."""

import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

from infra.blobs.port import ref_of
from infra.embedding.factory import open_embedder
from infra.opensearch.client import connect
from infra.opensearch.index import OpenSearchIndex
from infra.opensearch.terms import OpenSearchTerms
from infra.redis.answers import RedisAnswerCache
from infra.redis.connect import connect_redis
from infra.settings import Settings
from ingest.core.content import choose_content_type
from schemas.events import Change, DocumentEvent
from streams.dry_run import DryRun, DryRunResult, Preparation
from streams.evaluation import EvaluationContext
from streams.parsing.sandbox import ParserPool
from streams.worker import fusion, profile, splitter


async def dry_run(
    settings: Settings,
    document_id: str,
    content: bytes | None,
    *,
    file_name: str | None = None,
    title: str | None = None,
    groups: Sequence[str] = (),
) -> DryRunResult:
    """What an upload, or a delete, would do to the cached answers of the default tenant.

    Args:
        settings: settings of the installation.
        document_id: id of the document, also used as its source, as by ``freshline ingest``.
        content: content of the upload; None for a delete.
        file_name: file name, from which the content type is derived.
        title: title of the document.
        groups: groups that may see it.

    Raises:
        UnsupportedType: of content.
        Unprocessable: the edit would become a dead letter.
        DryRunUnavailable: the result cannot be determined at this moment.
        IndexUnavailable, CacheUnavailable, EmbeddingError: a store or the model does not answer.
    """
    event = DocumentEvent(
        event_id="dry-run",
        tenant=settings.tenant.default,
        document_id=document_id,
        version=1,
        change=Change.DELETED if content is None else Change.UPSERTED,
        accepted_ms=time.time() * 1_000,
        content=None if content is None else ref_of(content),
        content_type=None if content is None else choose_content_type(None, file_name),
        file_name=file_name,
        title=title,
        source=None if content is None else document_id,
        groups=tuple(groups),
    )
    async with AsyncExitStack() as closing:
        index = OpenSearchIndex.open(settings)
        closing.push_async_callback(index.close)
        client = connect(settings.opensearch)
        closing.push_async_callback(client.close)
        redis = connect_redis(settings.redis)
        closing.push_async_callback(redis.aclose)
        embedder = open_embedder(settings.embedding)
        closing.push_async_callback(embedder.close)
        parsers = ParserPool(settings.parse)
        closing.push_async_callback(parsers.close)
        await parsers.start()
        terms = OpenSearchTerms(client, settings)
        slices = RedisAnswerCache(redis, settings.names, settings.answers)
        dry_run = DryRun(
            index=index,
            terms=terms,
            preparation=Preparation(parsers, splitter(settings), profile(settings), embedder),
            context=EvaluationContext.of(slices, index, terms, fusion=fusion(settings), settings=settings.answers),
        )
        return await dry_run.run(event, content or b"")
