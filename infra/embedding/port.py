"""What the rest of Freshline knows of embedding models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from schemas.search import Vector

Matrix = NDArray[np.float32]
"""Shape ``(n, dimension)``, rows of unit length."""


class EmbeddingError(Exception):
    """The model did not turn a text into a vector."""


class EmbeddingThrottled(EmbeddingError):
    """The provider takes no more for now; nothing is wrong with the text.

    Attributes:
        retry_after_s: when to come back; the provider's word, or a guess where it gave none.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Which vectors these are.

    Attributes:
        name: what people call the model.
        dimension: length of a vector.
        max_tokens: what lies beyond is cut off, special tokens included.
        fingerprint: identity of the vectors; part of every stored vector's key. Same fingerprint and same text, same
            vector.
        query_prefix: put before a query (never before a passage) by the embedder itself.
    """

    name: str
    dimension: int
    max_tokens: int
    fingerprint: str
    query_prefix: str = ""


class Embedder(Protocol):
    """A model. Texts are never blank: the splitter and the query model see to that.

    A vector depends on its text and the model alone, never on the texts it travelled with: stored vectors are shared
    between documents, and a replay must find the same ones.
    """

    @property
    def model(self) -> ModelInfo:
        """Which vectors these are."""
        ...

    async def embed_passages(self, texts: Sequence[str]) -> Matrix:
        """Vectors of passages, in the order of ``texts``; ``(0, dimension)`` for none.

        Raises:
            EmbeddingThrottled: come back later.
            EmbeddingError: a text could not be embedded.
        """
        ...

    async def embed_query(self, text: str) -> Vector:
        """Vector of a question; never waits behind a queue of passages.

        Raises:
            EmbeddingThrottled: come back later.
            EmbeddingError: the text could not be embedded.
        """
        ...

    async def close(self) -> None:
        """Free threads and connections; the embedder is not usable afterwards."""
        ...
