"""Embedder without a model, for tests and simulation."""

import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

import numpy as np
from typing_extensions import override

from infra.embedding.port import Embedder, Matrix, ModelInfo
from schemas.search import Vector

_WORD: Final = re.compile(r"\w+")


class HashingEmbedder(Embedder):
    """Counts words in buckets chosen by a hash, so that texts with common words have similar vectors.

    Args:
        dimension: number of buckets.
    """

    def __init__(self, dimension: int = 384) -> None:
        self._model = ModelInfo("hashing", dimension, max_tokens=1_000_000, fingerprint=f"hashing-{dimension}")

    @property
    @override
    def model(self) -> ModelInfo:
        return self._model

    @override
    async def embed_passages(self, texts: Sequence[str]) -> Matrix:
        return np.array([self._embed(text) for text in texts], dtype=np.float32).reshape(-1, self._model.dimension)

    @override
    async def embed_query(self, text: str) -> Vector:
        return self._embed(text)

    @override
    async def close(self) -> None:
        pass

    def _embed(self, text: str) -> Vector:
        # Counts are not negative, so words cannot cancel each other. A text without words counts as one word.
        buckets = np.zeros(self._model.dimension, dtype=np.float32)
        for word in _WORD.findall(text.lower()) or [text]:
            # Not hash(), which differs between processes.
            buckets[int.from_bytes(blake2b(word.encode(), digest_size=8).digest()) % len(buckets)] += 1
        return buckets / np.linalg.norm(buckets)
