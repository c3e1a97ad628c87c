"""Settings for an index with short vectors."""

from infra.settings import Settings

DIMENSION = 8


def small(settings: Settings) -> Settings:
    """The settings, with vectors of length ``DIMENSION``."""
    embedding = settings.embedding.model_copy(update={"dimension": DIMENSION})
    return settings.model_copy(update={"embedding": embedding})
