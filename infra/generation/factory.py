"""Creation of the generator from the settings."""

from infra.embedding.port import Embedder
from infra.generation.bedrock import BedrockGenerator, connect
from infra.generation.extractive import ExtractiveGenerator
from infra.generation.openai import OpenAIGenerator
from infra.generation.port import Generator
from infra.settings import GenerationSettings


def open_generator(settings: GenerationSettings, embedder: Embedder | None = None) -> Generator:
    """Open the configured generator. ``embedder`` is used by ``ExtractiveGenerator`` only.

    Raises:
        ValueError: a setting that the provider requires is missing.
    """
    if settings.provider == "extractive":
        return ExtractiveGenerator(embedder)
    if not settings.model:
        raise ValueError(f"generator.model is not set: set it to a model of {settings.provider}")
    if settings.provider == "bedrock":
        client = connect(settings.region, timeout_s=settings.timeout_s)
        return BedrockGenerator(client, settings.model, max_tokens=settings.max_tokens)
    if not settings.base_url:
        raise ValueError("generator.base_url is not set: set it to the endpoint, such as http://127.0.0.1:8000/v1")
    return OpenAIGenerator(
        settings.base_url,
        settings.model,
        api_key=settings.api_key,
        max_tokens=settings.max_tokens,
        timeout_s=settings.timeout_s,
    )
