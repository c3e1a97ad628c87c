"""Creation of the embedder from the settings."""

import os

from infra.embedding.batching import BatchingEmbedder
from infra.embedding.bedrock import TITAN, BedrockEmbedder, connect, token_counter
from infra.embedding.onnx import OnnxEmbedder, load_tokenizer
from infra.embedding.port import Embedder
from infra.settings import EmbeddingSettings

_BEDROCK_CALLS = 8


def open_embedder(settings: EmbeddingSettings) -> Embedder:
    """Load or connect the model, which concurrent calls share. Takes a fraction of a second, so call it at the start.

    Raises:
        ValueError: the model is unknown or has another dimension.
        FileNotFoundError: files of the model are missing.
    """
    if settings.provider == "bedrock":
        if settings.model != TITAN:
            raise ValueError(f"embedding.model is {settings.model!r}; with bedrock it must be {TITAN!r}")
        client = connect(settings.region, calls=_BEDROCK_CALLS)
        return BatchingEmbedder(
            BedrockEmbedder(client, dimension=settings.dimension, calls=_BEDROCK_CALLS), batch_size=_BEDROCK_CALLS
        )
    threads = settings.threads or os.cpu_count() or 1
    embedder = OnnxEmbedder(settings.models_path, settings.model, threads=threads)
    if embedder.model.dimension != settings.dimension:
        raise ValueError(
            f"embedding.dimension is {settings.dimension}, but {settings.model} has {embedder.model.dimension}"
        )
    # Texts are embedded one by one, so larger batches would only increase the wait of a single passage.
    return BatchingEmbedder(embedder, batch_size=threads)


def open_tokenizer(settings: EmbeddingSettings) -> str:
    """Tokenizer for counting tokens of the model, as JSON of the ``tokenizers`` library.

    Raises:
        ValueError: the model is unknown.
        FileNotFoundError: files of the model are missing.
    """
    if settings.provider == "bedrock":
        return token_counter().to_str()
    return load_tokenizer(settings.models_path, settings.model).to_str()
