"""Which passages a search may find: the rule that both legs filter by, for those who judge without the index."""

from infra.opensearch.port import HybridSearch
from schemas.index import StoredChunk, metadata_term, metadata_terms, metadata_text


def allows(search: HybridSearch, chunk: StoredChunk) -> bool:
    """True if access and filters of ``search`` let it find ``chunk``."""
    if chunk.tenant != search.access.tenant or (chunk.groups and not set(chunk.groups) & set(search.access.groups)):
        return False
    terms = metadata_terms(chunk.metadata)
    for name, wanted in search.filters.items():
        values = wanted if isinstance(wanted, tuple) else (wanted,)
        metadata_name = name.removeprefix("metadata.")
        if metadata_name != name:
            if not any(metadata_term(metadata_name, value) in terms for value in values):
                return False
        elif getattr(chunk, name) not in map(metadata_text, values):
            return False
    return True
