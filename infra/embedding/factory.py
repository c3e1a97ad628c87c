"""The embedder that the settings ask for."""

import os

from infra.embedding.batching import BatchingEmbedder
from infra.embedding.bedrock import TITAN, BedrockEmbedder, connect, token_counter
from infra.embedding.onnx import OnnxEmbedder, load_tokenizer
from infra.embedding.port import Embedder
from infra.settings import EmbeddingSettings

_BEDROCK_CALLS = 8


def open_embedder(settings: EmbeddingSettings) -> Embedder:
    """Load or connect the model, shared by concurrent calls; takes a fraction of a second, so call it at start.

    Raises:
        ValueError: the model is not known or has vectors of another length.
        FileNotFoundError: the model's files are not there.
    """
    if settings.provider == "bedrock":
        if settings.model != TITAN:
            raise ValueError(f"embedding.model is {settings.model!r}; with bedrock it must be {TITAN!r}")
        client = connect(settings.region, calls=_BEDROCK_CALLS)
        return BatchingEmbedder(
            BedrockEmbedder(client, dimension=settings.dimension, calls=_BEDROCK_CALLS), texts_per_go=_BEDROCK_CALLS
        )
    threads = settings.threads or os.cpu_count() or 1
    embedder = OnnxEmbedder(settings.models_path, settings.model, threads=threads)
    if embedder.model.dimension != settings.dimension:
        raise ValueError(
            f"embedding.dimension is {settings.dimension}, but {settings.model} has {embedder.model.dimension}"
        )
    # Texts are run one by one, so larger goes would gain nothing and make a lone passage wait for more of them.
    return BatchingEmbedder(embedder, texts_per_go=threads)


def open_tokenizer(settings: EmbeddingSettings) -> str:
    """What counts the tokens of the model that the settings ask for, as JSON of the ``tokenizers`` library.

    Raises:
        ValueError, FileNotFoundError: see ``open_embedder``.
    """
    if settings.provider == "bedrock":
        return token_counter().to_str()
    return load_tokenizer(settings.models_path, settings.model).to_str()
