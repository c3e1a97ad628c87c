"""Searches as the query tier sends them."""

from collections.abc import Sequence

from infra.embedding.factory import open_embedder
from infra.settings import Settings
from query.cache.key import normalised
from schemas.search import Access, HybridSearch


async def searches_of(settings: Settings, questions: Sequence[str]) -> list[HybridSearch]:
    """A search for each question, in the default tenant."""
    embedder = open_embedder(settings.embedding)
    access, window = Access(settings.tenant.default), settings.query.candidates_kept
    try:
        return [
            HybridSearch(text, await embedder.embed_query(text), access, window) for text in map(normalised, questions)
        ]
    finally:
        await embedder.close()
