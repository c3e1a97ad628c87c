"""The searches that the query tier makes of questions."""

from collections.abc import Sequence

from infra.embedding.factory import open_embedder
from infra.settings import Settings
from query.cache.key import normalised
from schemas.search import Access, HybridSearch


async def searches_of(settings: Settings, questions: Sequence[str]) -> list[HybridSearch]:
    """One for each question, of the tenant that an installation has by default."""
    embedder = open_embedder(settings.embedding)
    access, window = Access(settings.tenant.default), settings.query.window_kept
    try:
        return [
            HybridSearch(text, await embedder.embed_query(text), access, window) for text in map(normalised, questions)
        ]
    finally:
        await embedder.close()
