"""Port of embedding models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from schemas.search import Vector

Matrix = NDArray[np.float32]
"""Shape ``(n, dimension)``, rows of unit length."""


class EmbeddingError(Exception):
    """The model did not embed a text."""


class EmbeddingThrottled(EmbeddingError):
    """The provider rejects calls for now, whatever the text.

    Attributes:
        retry_after_s: seconds to wait, as the provider requests or by default.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Properties of a model.

    Attributes:
        name: name of the model.
        dimension: length of a vector.
        max_tokens: maximum length of a text, including special tokens; longer texts are truncated.
        fingerprint: identity of the vectors, part of the key of every stored vector. Equal fingerprints and texts imply
            equal vectors.
        query_prefix: prefix that the embedder adds to questions, not to passages.
    """

    name: str
    dimension: int
    max_tokens: int
    fingerprint: str
    query_prefix: str = ""


class Embedder(Protocol):
    """An embedding model. Texts are never blank: the splitter and the request model exclude them.

    A vector depends on its text and the model only, not on other texts of the call: stored vectors are shared between
    documents, and a replay must produce the same ones.
    """

    @property
    def model(self) -> ModelInfo:
        """Properties of the model."""
        ...

    async def embed_passages(self, texts: Sequence[str]) -> Matrix:
        """Vectors of passages, in the order of ``texts``; shape ``(0, dimension)`` for none.

        Raises:
            EmbeddingThrottled: the provider rejects calls for now.
            EmbeddingError: a text could not be embedded.
        """
        ...

    async def embed_query(self, text: str) -> Vector:
        """Vector of a question. Never queued behind passages.

        Raises:
            EmbeddingThrottled: the provider rejects calls for now.
            EmbeddingError: the text could not be embedded.
        """
        ...

    async def close(self) -> None:
        """Release threads and connections. The embedder cannot be used afterwards."""
        ...
