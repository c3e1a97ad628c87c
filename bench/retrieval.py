"""Retrieval quality on a collection with relevance judgements (BEIR layout): nDCG@10 of retrievers and fusion.

Passages are split, embedded, indexed and searched by the product's code. A document is ranked by its best passage.
"""

import gzip
import math
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from freshline.installation import settings_from
from infra.embedding.factory import open_embedder, open_tokenizer
from infra.embedding.port import Embedder
from infra.local import Stack
from infra.opensearch.index import OpenSearchIndex
from infra.opensearch.port import ChunkChange, ChunkWrite
from infra.opensearch.provision import create_indices, delete_indices
from infra.settings import Settings
from query.retrieval.fusion import fuse
from schemas.documents import DocumentKey
from schemas.index import StoredChunk
from schemas.search import RRF_K, Access, HybridSearch
from streams.core.chunk_identity import with_ids
from streams.core.splitting import Splitter, embedding_text

MODELS: Final = ("all-minilm-l6-v2", "bge-small-en-v1.5")
_TENANT: Final = "bench"
_CUTOFF: Final = 10
_BATCH: Final = 64
_SEED: Final = 1
_RESAMPLES: Final = 10_000


async def bench_retrieval(stack: Stack, collection: Path, *, models: Sequence[str] = MODELS) -> dict[str, Any]:
    """Measure each model on ``collection`` (corpus.jsonl[.gz], queries.jsonl, qrels.tsv)."""
    queries = {str(row["_id"]): str(row["text"]) for row in _rows(collection / "queries.jsonl")}
    judgements = _judgements(collection / "qrels.tsv")
    corpus = list(_rows(_corpus(collection)))
    measured = {model: await _measure(stack, model, corpus, queries, judgements) for model in models}
    figures = {model: one for model, (one, _) in measured.items()}
    first, *others = measured
    differences = {f"{other} - {first}": _difference(measured[first][1], measured[other][1]) for other in others}
    return {"documents": len(corpus), "queries": len(judgements), "models": figures, "hybrid_difference": differences}


def ndcg(ranked: Sequence[str], gains: Mapping[str, int], cutoff: int = _CUTOFF) -> float:
    """Normalised discounted cumulative gain with linear gains, as in trec_eval."""
    gained = sum(gains.get(one, 0) / math.log2(rank + 2) for rank, one in enumerate(ranked[:cutoff]))
    ideal = sum(gain / math.log2(rank + 2) for rank, gain in enumerate(sorted(gains.values(), reverse=True)[:cutoff]))
    return gained / ideal if ideal else 0.0


async def _measure(
    stack: Stack,
    model: str,
    corpus: Sequence[Mapping[str, Any]],
    queries: Mapping[str, str],
    judgements: Mapping[str, Mapping[str, int]],
) -> tuple[dict[str, Any], list[float]]:
    """Figures of a model, and the hybrid score of each query."""
    overrides = {"FRESHLINE_NAMESPACE": f"bench-{secrets.token_hex(4)}", "FRESHLINE_EMBEDDING__MODEL": model}
    settings = settings_from(stack.environment() | overrides)
    await create_indices(settings)
    index = OpenSearchIndex.open(settings)
    embedder = open_embedder(settings.embedding)
    try:
        began_s = time.perf_counter()
        chunks = await _fill(index, embedder, settings, corpus)
        filled_s = time.perf_counter() - began_s
        scores: dict[str, list[float]] = {"bm25": [], "vector": [], "hybrid": []}
        began_s = time.perf_counter()
        for query, gains in judgements.items():
            vector = await embedder.embed_query(queries[query])
            window = settings.query.candidates
            [candidates] = await index.search([HybridSearch(queries[query], vector, Access(_TENANT), window)])
            fused = fuse(candidates, k=RRF_K)
            for retriever, keys in (
                ("bm25", [hit.key for hit in candidates.lexical]),
                ("vector", [hit.key for hit in candidates.vector]),
                ("hybrid", [candidate.hit.key for candidate in fused]),
            ):
                scores[retriever].append(ndcg(_documents(keys), gains))
        query_ms = (time.perf_counter() - began_s) * 1000 / len(judgements)
    finally:
        await embedder.close()
        await index.close()
        await delete_indices(settings)
    figures = {
        "ndcg_at_10": {retriever: round(sum(values) / len(values), 4) for retriever, values in scores.items()},
        "chunks": chunks,
        "chunks_per_s": round(chunks / filled_s, 1),
        "mean_query_ms": round(query_ms, 1),
    }
    return figures, scores["hybrid"]


def _difference(first: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Mean paired difference and its 95 % bootstrap interval."""
    paired = np.asarray(other) - np.asarray(first)
    resampled = np.random.default_rng(_SEED).choice(paired, (_RESAMPLES, len(paired))).mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"mean": round(float(paired.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


async def _fill(
    index: OpenSearchIndex, embedder: Embedder, settings: Settings, corpus: Sequence[Mapping[str, Any]]
) -> int:
    tokenizer = open_tokenizer(settings.embedding)
    splitter = Splitter(tokenizer, settings.split.chunk_tokens, settings.split.overlap_tokens)
    total = 0
    for start in range(0, len(corpus), _BATCH):
        rows = corpus[start : start + _BATCH]
        planned = [(row, splitter.split(str(row["text"]), row["title"])) for row in rows]
        texts = [embedding_text(row["title"], chunk) for row, chunks in planned for chunk in chunks]
        vectors = iter(await embedder.embed_passages(texts))
        changes = []
        for row, chunks in planned:
            key = DocumentKey(_TENANT, str(row["_id"]))
            bare = [
                StoredChunk(
                    chunk_id="",
                    tenant=key.tenant,
                    document_id=key.document_id,
                    version=1,
                    position="documents.v1-0:0",
                    title=row["title"],
                    **dict(chunk),
                )
                for chunk in chunks
            ]
            put = tuple(ChunkWrite(chunk, next(vectors)) for chunk in with_ids(bare, "bench"))
            changes.append(ChunkChange(key, 1, put, ()))
            total += len(put)
        await index.apply(changes)
    return total


def _documents(keys: Iterable[DocumentKey]) -> list[str]:
    return list(dict.fromkeys(key.document_id for key in keys))


def _judgements(path: Path) -> dict[str, dict[str, int]]:
    judgements: dict[str, dict[str, int]] = {}
    for line in path.read_text().splitlines():
        query, document, gain = line.split("\t")
        if gain.lstrip("-").isdigit() and int(gain) > 0:
            judgements.setdefault(query, {})[document] = int(gain)
    return judgements


def _corpus(collection: Path) -> Path:
    return next(collection.glob("corpus.jsonl*"))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for line in file:
            yield orjson.loads(line)
