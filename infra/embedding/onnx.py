"""Sentence-transformer models as int8 ONNX files, run in this process.

Each run has one text and one thread:

- These models quantize activations by the range of the whole batch, so a vector would depend on the other texts: the
  cosine of a text alone and in a padded batch was 0.988 (MiniLM) and 0.997 (BGE). Alone, the vector is reproducible bit
  by bit with any number of threads.
- Batches are not faster. Texts per second on 2 cores (Xeon with AVX-512 VNNI; passages of 193 tokens on average,
  queries of 23), and milliseconds per text on an idle machine:

  ================================  ===============  ===============
  ..                                MiniLM           BGE small
  ================================  ===============  ===============
  passages, 1 per run, 2 threads    198/s            75-93/s
  passages, sorted batches of 8     172/s            89/s
  passages, 1 per run, intra-op 2   131/s            63/s
  queries, 1 per run, 2 threads     1,340/s          773/s
  queries, sorted batches of 8      1,690/s          829/s
  one query, intra-op 1 / 2         1.4 / 1.6 ms     2.8 / 3.0 ms
  one 200-token text, intra-op 1/2  10.5 / 8.1 ms    21 / 16 ms
  ================================  ===============  ===============

  Two threads per run save 2 to 5 ms for a single passage, and only by spinning. This does not justify a second copy of
  the weights and a busy core.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer
from typing_extensions import override

from infra.embedding.port import Embedder, EmbeddingError, Matrix, ModelInfo
from infra.embedding.thread_pools import EmbeddingThreadPools
from schemas.search import Vector

MODEL_FILE: Final = "model.onnx"
TOKENIZER_FILE: Final = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Usage of a model as its authors specify it; the files do not contain it."""

    pooling: Literal["mean", "first"]
    max_tokens: int
    query_prefix: str = ""


RECIPES: Final = {
    "all-minilm-l6-v2": Recipe(pooling="mean", max_tokens=256),
    "bge-small-en-v1.5": Recipe(
        pooling="first", max_tokens=512, query_prefix="Represent this sentence for searching relevant passages: "
    ),
}
"""The bundled models. Their files are ``models_path/NAME/model.onnx`` and ``models_path/NAME/tokenizer.json``."""


def load_tokenizer(models_path: Path, name: str) -> Tokenizer:
    """The tokenizer of a bundled model, without truncation and padding, for counting tokens.

    Raises:
        ValueError: the model is unknown.
        FileNotFoundError: files of the model are missing.
    """
    tokenizer = Tokenizer.from_file(str(_files(models_path, name)[1]))
    # One of the files enables padding and truncation to 128 tokens, which is wrong for the model and for counting.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class OnnxEmbedder(Embedder):
    """A bundled model.

    Args:
        models_path: directory of the models.
        name: a key of ``RECIPES``.
        threads: concurrent runs of each thread pool.

    Raises:
        ValueError: the model is unknown.
        FileNotFoundError: files of the model are missing.
    """

    def __init__(self, models_path: Path, name: str, *, threads: int) -> None:
        self._tokenizer = load_tokenizer(models_path, name)
        self._recipe = recipe = RECIPES[name]
        self._tokenizer.enable_truncation(recipe.max_tokens)
        weights = _files(models_path, name)[0].read_bytes()
        self._session = _open_session(weights)
        self._model = ModelInfo(
            name=name,
            dimension=self._session.get_outputs()[0].shape[-1],
            max_tokens=recipe.max_tokens,
            fingerprint=f"{name}@{_fingerprint(recipe, weights, self._tokenizer)}",
            query_prefix=recipe.query_prefix,
        )
        self._pools = EmbeddingThreadPools(self._embed, dimension=self._model.dimension, threads=threads)

    @property
    @override
    def model(self) -> ModelInfo:
        return self._model

    @override
    async def embed_passages(self, texts: Sequence[str]) -> Matrix:
        return await self._pools.passages(texts)

    @override
    async def embed_query(self, text: str) -> Vector:
        return await self._pools.query(self._model.query_prefix + text)

    @override
    async def close(self) -> None:
        await self._pools.close()
        self._session = None  # releases the weights, even if this object is still referenced

    def _embed(self, text: str) -> Vector:
        try:
            ids = np.array([self._tokenizer.encode(text).ids], dtype=np.int64)
            hidden_states: Matrix = self._session.run(
                None, {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
            )[0][0]
        except Exception as error:
            raise EmbeddingError(f"{self._model.name} could not embed a text of {len(text)} characters") from error
        pooled: Vector = hidden_states[0] if self._recipe.pooling == "first" else hidden_states.mean(axis=0)
        return pooled / np.linalg.norm(pooled)


def _files(models_path: Path, name: str) -> tuple[Path, Path]:
    if name not in RECIPES:
        raise ValueError(f"embedding.model is {name!r}; the bundled models are {', '.join(RECIPES)}")
    files = (models_path / name / MODEL_FILE, models_path / name / TOKENIZER_FILE)
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing: set embedding.models_path to the directory that contains "
                f"{name}/{MODEL_FILE} and {name}/{TOKENIZER_FILE}"
            )
    return files


def _open_session(weights: bytes) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    # Lengths differ between runs, so memory plans would not be reused, and one per length would be kept.
    options.enable_mem_pattern = False
    return ort.InferenceSession(weights, options, providers=["CPUExecutionProvider"])


def _fingerprint(recipe: Recipe, weights: bytes, tokenizer: Tokenizer) -> str:
    """Hash of everything that determines a vector: weights, tokenizer with truncation, pooling."""
    digest = sha256(weights)
    digest.update(tokenizer.to_str().encode())
    digest.update(recipe.pooling.encode())
    return digest.hexdigest()[:12]
