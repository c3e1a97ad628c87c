"""Exact invalidation: drop the answers whose sources a change alters, and no other.

Each answer's windows are kept as the index would give them now (``windows``), and where a change touches them the top k
is fused anew. Same passages: keep, even in another order. Others: drop. Windows that removals have made shorter than
what is fused: retrieve again to tell.

The vector leg is one matrix product of all questions with all added passages. The lexical leg scores the questions that
have a term of the added passages; finding them takes one look at each question's terms, which in an array costs less
than keeping lists of questions for each term.
"""

from collections.abc import Iterable, KeysView, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from infra.opensearch.access import allows
from infra.opensearch.port import HybridSearch, Vector
from streams.core.invalidation.bm25 import Floats, idf, length_code, length_norms
from streams.core.invalidation.evidence import Change, Evidence, Passage, Statistics
from streams.core.invalidation.fused import top_k, top_of
from streams.core.invalidation.policy import Verdict
from streams.core.invalidation.rows import NO_ROWS, Rows, grown
from streams.core.invalidation.windows import NOBODY, Flags, LexicalWindows, Newcomer, VectorWindows

MAX_TERMS: Final = 16
"""Different terms of a question that is judged; one with more is retrieved again at each change."""

_MAX_SOURCES: Final = 50
_FIRST_ROWS: Final = 256
_BLOCK_ROWS: Final = 4_096
_DRIFT: Final = np.float32(0.9)
"""Statistics may have moved a floor so far down since it was last computed."""


@dataclass(frozen=True, slots=True)
class _Long:
    """An answer to a question of too many terms: its windows are not kept.

    Attributes:
        sources: ids of its passages.
        differs: whether the windows that it was put with lead to others.
    """

    sources: frozenset[str]
    differs: bool


class Exact:
    """See ``Policy``.

    Args:
        dimension: length of vectors.
        kept: places of a window that are kept.
        fused: places of a window that are fused.
        rrf_k: constant of the fusion.
    """

    def __init__(self, *, dimension: int, kept: int, fused: int, rrf_k: int) -> None:
        self._kept = kept
        self._fused = fused
        self._rrf_k = rrf_k
        self._deepest = max(fused, _MAX_SOURCES)
        self._rows: dict[str, int] = {}
        self._keys: list[str | None] = []
        self._free: list[int] = []
        self._questions = np.empty((0, dimension), dtype=np.float32)
        self._top_k = np.empty(0, dtype=np.int16)
        self._sources = np.empty((0, _MAX_SOURCES), dtype=np.int32)
        self._versions = np.empty((0, _MAX_SOURCES), dtype=np.int64)
        self._readers = np.empty(0, dtype=np.int32)
        self._terms = np.empty((0, MAX_TERMS), dtype=np.int32)
        self._repeats = np.empty((0, MAX_TERMS), dtype=np.float32)
        self._vector = VectorWindows(kept)
        self._lexical = LexicalWindows(kept, MAX_TERMS)
        self._passages: dict[str, int] = {}
        self._next_passage = 0
        self._reader_numbers: dict[object, int] = {}
        self._reader_searches: list[HybridSearch] = []
        # Term 0 is no term: it pads the rows of shorter questions, and weighs nothing.
        self._vocabulary: dict[str, int] = {"": 0}
        self._frequencies = np.zeros(1, dtype=np.int64)
        self._long: dict[str, _Long] = {}
        self._unscored: list[int] = []

    def __len__(self) -> int:
        return len(self._rows) + len(self._long)

    @property
    def vocabulary(self) -> KeysView[str]:
        """The terms of the questions: whose frequencies matter."""
        return self._vocabulary.keys()

    def put(self, evidence: Evidence) -> None:
        """See ``Policy``."""
        self.discard(evidence.key)
        if len(evidence.terms) > MAX_TERMS:
            self._long[evidence.key] = self._unmaintained(evidence)
            return
        row = self._take_row(evidence.key)
        self._questions[row] = evidence.search.vector
        self._top_k[row] = evidence.top_k
        self._readers[row] = self._reader(evidence.search)
        count = len(evidence.sources)
        self._sources[row], self._versions[row] = NOBODY, NOBODY
        self._sources[row, :count] = self._numbers(chunk_id for chunk_id, _ in evidence.sources)
        self._versions[row, :count] = [version for _, version in evidence.sources]
        self._terms[row], self._repeats[row] = 0, 0
        for column, (term, repeats) in enumerate(evidence.terms.items()):
            self._terms[row, column] = self._term(term)
            self._repeats[row, column] = repeats
        vector = evidence.vector_window[: self._kept]
        self._vector.put(
            row,
            self._numbers(chunk_id for chunk_id, _ in vector),
            [score for _, score in vector],
            whole=len(evidence.vector_window) < evidence.search.window,
        )
        lexical = evidence.lexical_window[: self._kept]
        counts = [[min(counts.frequencies.get(term, 0), 255) for _, counts in lexical] for term in evidence.terms]
        self._lexical.put(
            row,
            self._numbers(chunk_id for chunk_id, _ in lexical),
            np.array(counts, dtype=np.uint8).reshape(len(counts), len(lexical)),
            [length_code(counts.length) for _, counts in lexical],
            whole=len(evidence.lexical_window) < evidence.search.window,
        )
        self._unscored.append(row)

    def discard(self, key: str) -> None:
        """See ``Policy``."""
        self._long.pop(key, None)
        row = self._rows.pop(key, None)
        if row is not None:
            self._keys[row] = None
            self._free.append(row)
            self._vector.clear(row)
            self._lexical.clear(row)
            self._sources[row] = NOBODY
            self._terms[row] = 0

    def judge(self, change: Change, statistics: Statistics) -> Verdict:
        """See ``Policy``. Costs time linear in the number of answers, and in that of windows that are touched."""
        norms = length_norms(statistics.average_length)
        self._learn(statistics, norms)
        touched, altered = self._remove(change)
        added = [(self._number(passage.chunk.chunk_id), passage) for passage in change.added]
        if added and self._rows:
            visible = self._visible(change.added)
            touched += self._enter_vector(added, visible)
            touched += self._enter_lexical(added, visible, statistics, norms)
        rows = np.unique(np.concatenate((NO_ROWS, *touched)))
        rows = rows[~np.isin(rows, altered)]
        unclear: list[Rows] = []
        changed: list[Rows] = [altered]
        for start in range(0, len(rows), _BLOCK_ROWS):
            block = rows[start : start + _BLOCK_ROWS]
            differs, short = self._fuse(block, statistics, norms)
            unclear.append(block[short])
            changed.append(block[differs & ~short])
        drop = self._keys_of(np.concatenate(changed))
        recheck = self._keys_of(np.concatenate((NO_ROWS, *unclear)))
        for key in drop:
            self.discard(key)
        touched_ids = change.removed.union(passage.chunk.chunk_id for passage in change.added)
        lost = frozenset(key for key, one in self._long.items() if not one.sources.isdisjoint(touched_ids))
        for key in lost:
            self.discard(key)
        return Verdict(drop | lost, recheck.union(self._long if touched_ids else ()))

    def altered(self, keys: Iterable[str], statistics: Statistics) -> frozenset[str]:
        """Of answers whose windows were put anew, those whose sources are not what the windows lead to."""
        norms = length_norms(statistics.average_length)
        self._learn(statistics, norms)
        keys = frozenset(keys)
        other = frozenset(key for key in keys if key in self._long and self._long[key].differs)
        rows = np.array(sorted(self._rows[key] for key in keys if key in self._rows), dtype=np.intp)
        if not len(rows):
            return other
        differs, _ = self._fuse(rows, statistics, norms)
        return other | self._keys_of(rows[differs])

    def _unmaintained(self, evidence: Evidence) -> _Long:
        sources = frozenset(chunk_id for chunk_id, _ in evidence.sources)
        best = top_of(
            [chunk_id for chunk_id, _ in evidence.vector_window],
            [chunk_id for chunk_id, _ in evidence.lexical_window],
            evidence.top_k,
            places=self._fused,
            rrf_k=self._rrf_k,
        )
        return _Long(sources, best != sources)

    def _learn(self, statistics: Statistics, norms: Floats) -> None:
        for term, frequency in statistics.frequencies.items():
            if (number := self._vocabulary.get(term)) is not None:
                self._frequencies[number] = frequency
        weights = idf(self._frequencies, statistics.document_count)
        unscored = np.array(self._unscored, dtype=np.intp)
        self._unscored.clear()
        for start in range(0, len(unscored), _BLOCK_ROWS):
            rows = unscored[start : start + _BLOCK_ROWS]
            self._lexical.rescored(rows, self._weights(rows, weights), norms)

    def _remove(self, change: Change) -> tuple[list[Rows], Rows]:
        """Take out what is gone and what is stored anew; the rows it was in, and those of them that are altered."""
        touched: list[Rows] = []
        altered: list[Rows] = []
        versions = {passage.chunk.chunk_id: passage.chunk.version for passage in change.added}
        for chunk_id in change.removed.union(versions):
            number = self._passages.get(chunk_id)
            if number is None:
                continue
            rows = np.union1d(self._vector.remove(number), self._lexical.remove(number))
            cited = self._sources[rows] == number
            # No version is below zero: a removed source is never the same.
            other = cited & (self._versions[rows] != versions.get(chunk_id, NOBODY))
            touched.append(rows)
            altered.append(rows[other.any(axis=1)])
            if chunk_id not in versions:
                del self._passages[chunk_id]
        return touched, np.unique(np.concatenate((NO_ROWS, *altered)))

    def _visible(self, added: Sequence[Passage]) -> Flags:
        """Which rows may find which passages, shape (rows, passages)."""
        allowed = [[allows(search, passage.chunk) for passage in added] for search in self._reader_searches]
        visible: Flags = np.array(allowed, dtype=bool)[self._readers]
        return visible

    def _enter_vector(self, added: Sequence[tuple[int, Passage]], visible: Flags) -> list[Rows]:
        passages: Vector = np.stack([passage.vector for _, passage in added]).astype(np.float32)
        scores = (1 + self._questions @ passages.T) / 2
        enters = (scores > self._vector.floors[:, None]) & visible
        entered = []
        for column, (number, _) in enumerate(added):
            rows = np.flatnonzero(enters[:, column])
            entered.append(self._vector.enter(number, rows, scores[rows, column], rank=self._deepest))
        return entered

    def _enter_lexical(
        self, added: Sequence[tuple[int, Passage]], visible: Flags, statistics: Statistics, norms: Floats
    ) -> list[Rows]:
        weights = idf(self._frequencies, statistics.document_count)
        lengths = [length_code(passage.terms.length) for _, passage in added]
        counts = np.zeros((len(self._frequencies), len(added)), dtype=np.uint8)
        for column, (_, passage) in enumerate(added):
            for text, count in passage.terms.frequencies.items():
                if (term := self._vocabulary.get(text)) is not None:
                    counts[term, column] = min(count, 255)
        shares = counts / (counts + norms[lengths]) * weights[:, None]
        # Few questions have a term of what was added: the others are passed over at one look.
        asked = np.flatnonzero((counts.max(axis=1) > 0)[self._terms].any(axis=1))
        scores = np.zeros((len(asked), len(added)), dtype=np.float32)
        for terms, repeats in zip(self._terms[asked].T, self._repeats[asked].T, strict=True):
            if repeats.any():
                scores += shares[terms] * repeats[:, None]
        near: Flags = np.logical_and(scores > 0, scores >= self._lexical.floors[asked, None] * _DRIFT) & visible[asked]
        at_all = near.any(axis=1)
        rows, scores, near = asked[at_all], scores[at_all], near[at_all]
        standing = self._lexical.rescored(rows, self._weights(rows, weights), norms)
        entered = []
        for column, (number, _) in enumerate(added):
            at = np.flatnonzero(near[:, column])
            frequencies = counts[self._terms[rows[at]], column]
            new = Newcomer(number, lengths[column], at, frequencies, scores[at, column])
            at = self._lexical.enter(new, rows, standing)
            higher = (standing[at] > scores[at, column][:, None]).sum(axis=1)
            entered.append(rows[at[higher < self._deepest]])
        return entered

    def _fuse(self, rows: Rows, statistics: Statistics, norms: Floats) -> tuple[Flags, Flags]:
        """Which rows have other sources now, and which are too short to tell."""
        weights = self._weights(rows, idf(self._frequencies, statistics.document_count))
        vector, lexical = self._vector.scores(rows), self._lexical.rescored(rows, weights, norms)
        fresh = top_k(
            (self._vector.ids[rows], vector),
            (self._lexical.ids[rows], lexical),
            self._top_k[rows],
            places=self._fused,
            rrf_k=self._rrf_k,
        )
        differs = (np.sort(self._sources[rows], axis=1)[:, -fresh.shape[1] :] != fresh).any(axis=1)
        fused = np.maximum(self._top_k[rows], self._fused)
        short = np.zeros(len(rows), dtype=bool)
        for scores, floors in ((vector, self._vector.floors[rows]), (lexical, self._lexical.floors[rows])):
            known = (scores >= floors[:, None]).sum(axis=1)
            short |= (known < fused) & np.isfinite(floors)
        return differs, short

    def _weights(self, rows: Rows, weights: Floats) -> Floats:
        return np.asarray(weights[self._terms[rows]] * self._repeats[rows], dtype=np.float32)

    def _keys_of(self, rows: Rows) -> frozenset[str]:
        return frozenset(key for row in rows if (key := self._keys[row]) is not None)

    def _take_row(self, key: str) -> int:
        if not self._free:
            self._grow(max(_FIRST_ROWS, 2 * len(self._keys)))
        row = self._rows[key] = self._free.pop()
        self._keys[row] = key
        return row

    def _grow(self, rows: int) -> None:
        self._free += range(rows - 1, len(self._keys) - 1, -1)
        self._keys += [None] * (rows - len(self._keys))
        self._questions = grown(self._questions, rows, 0)
        self._top_k = grown(self._top_k, rows, 1)
        self._sources = grown(self._sources, rows, NOBODY)
        self._versions = grown(self._versions, rows, NOBODY)
        self._readers = grown(self._readers, rows, 0)
        self._terms = grown(self._terms, rows, 0)
        self._repeats = grown(self._repeats, rows, 0)
        self._vector.grow(rows)
        self._lexical.grow(rows)

    def _number(self, chunk_id: str) -> int:
        number = self._passages.get(chunk_id)
        if number is None:
            number = self._passages[chunk_id] = self._next_passage
            self._next_passage += 1
        return number

    def _numbers(self, chunk_ids: Iterable[str]) -> list[int]:
        return [self._number(chunk_id) for chunk_id in chunk_ids]

    def _term(self, text: str) -> int:
        term = self._vocabulary.get(text)
        if term is None:
            term = self._vocabulary[text] = len(self._vocabulary)
            if term >= len(self._frequencies):
                self._frequencies = grown(self._frequencies, 2 * term, 0)
        return term

    def _reader(self, search: HybridSearch) -> int:
        """Number of those who may find the same passages."""
        name = (search.access, tuple(sorted((name, repr(wanted)) for name, wanted in search.filters.items())))
        number = self._reader_numbers.get(name)
        if number is None:
            number = self._reader_numbers[name] = len(self._reader_searches)
            self._reader_searches.append(search)
        return number
