"""Exact invalidation: drops the answers whose sources a change alters, and no others.

The candidates of each answer are kept as the index would return them now (``candidate_tables``). An answer is dropped
if a change removes or rewrites one of its sources, or brings a passage into its fused top k that was no candidate at
the fill. If passages from the fill change places, because statistics changed or a passage that is no source was
removed, the answer is kept: that is drift of ranks, not a change of content. If removals leave fewer candidates than
are fused, the search has to be repeated.

Vector scores are computed as a product of all questions with all added passages; each question is read once. Lexical
scores are computed from the terms of an added passage to the questions that contain them. Only answers with a removal
or insertion near the top are evaluated further (``compiled``).
"""

from collections.abc import Iterable, KeysView, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from schemas.search import HybridSearch, allows
from streams.core.invalidation.bm25 import idf, inverse_norms, length_code, term_score
from streams.core.invalidation.candidate_tables import LexicalTable, VectorTable
from streams.core.invalidation.compiled import (
    EMPTY,
    MAX_FREQUENCY,
    Additions,
    AnswerColumns,
    Groups,
    Removals,
    Scoring,
    allocate_scratch,
    move_floors,
)
from streams.core.invalidation.evidence import Change, Evaluation, Evidence, Passage, Statistics
from streams.core.invalidation.fused import fused_top
from streams.core.invalidation.rows import NO_ROWS, Rows, grown
from streams.core.invalidation.source_table import SourceTable
from streams.core.invalidation.sweep import (
    IN_LEXICAL,
    IN_VECTOR,
    RowUpdates,
    allocate_updates,
    find_lexical_insertions,
    find_removals,
    find_vector_insertions,
    inserted_rows,
    order_by_row,
    sweep,
)
from streams.core.invalidation.verdicts import DROP, EDGE_RANKS, KEEP, SHORT, Verdicts, compare_rows

MAX_TERMS: Final = 16
"""Maximum number of distinct terms of a question that is evaluated. For a longer question, each change repeats the
search."""

_FIRST_ROWS: Final = 256
_UPDATES_PER_BLOCK: Final = 1 << 18
"""Pairs of a row and an added passage that are collected at once; bounds the memory of a large change."""
_ROUNDING: Final = np.float32(1e-6)
"""Maximum relative difference between a term score for several occurrences at once and the sum for single ones."""


@dataclass(frozen=True, slots=True)
class _Unmaintained:
    """An answer without maintained candidates.

    Its question has too many terms, or a candidate exceeds the maximum frequency.

    Attributes:
        sources: ids of its passages.
        differs: whether the candidates that were put yield other sources.
    """

    sources: frozenset[str]
    differs: bool


class Exact:
    """The exact invalidation policy. Only one thread may use it at a time; evaluations release the GIL.

    Args:
        dimension: length of vectors.
        kept: candidates of each retriever that are kept.
        fused: candidates of each retriever that are fused.
        rrf_k: constant of the fusion.
    """

    def __init__(self, *, dimension: int, kept: int, fused: int, rrf_k: int) -> None:
        self._kept = kept
        self._fused = fused
        self._rrf_k = rrf_k
        self._depth = fused
        self._rows: dict[str, int] = {}
        self._keys: list[str | None] = []
        self._free: list[int] = []
        self._questions = np.empty((0, dimension), dtype=np.float32)
        self._top_k = np.empty(0, dtype=np.int16)
        self._sources = SourceTable()
        self._readers = np.empty(0, dtype=np.int32)
        self._watched = np.empty(0, dtype=bool)  # evaluated at every change
        self._vector = VectorTable(kept)
        self._lexical = LexicalTable(kept, MAX_TERMS)
        # Working memory of one call.
        self._sums = np.empty(0, dtype=np.float32)
        self._found = np.empty(0, dtype=np.int32)
        self._ends = np.empty(0, dtype=np.int64)
        self._scratch = allocate_scratch(kept, self._depth)
        self._updates, self._ordered = allocate_updates(0), allocate_updates(0)
        self._passages: dict[str, int] = {}
        self._next_passage = 0
        self._reader_numbers: dict[object, int] = {}
        self._reader_searches: list[HybridSearch] = []
        # Term 0 is reserved: it terminates the terms of a question.
        self._vocabulary: dict[str, int] = {"": 0}
        self._frequencies = np.zeros(1, dtype=np.int64)
        self._unmaintained: dict[str, _Unmaintained] = {}

    def __len__(self) -> int:
        return len(self._rows) + len(self._unmaintained)

    @property
    def vocabulary(self) -> KeysView[str]:
        """Terms of the questions."""
        return self._vocabulary.keys()

    @property
    def size_bytes(self) -> int:
        """Size of the arrays that grow with the answers, without spare room."""
        fraction = len(self._rows) / max(len(self._keys), 1)
        own: list[NDArray[Any]] = [*self._columns(), self._watched, self._sums, self._found]
        own.append(self._ends)
        tables = round(fraction * sum(table.nbytes for table in own))
        candidates = self._vector.size_bytes(fraction) + self._lexical.size_bytes(fraction)
        return tables + candidates + self._sources.postings_bytes

    def put(self, evidence: Evidence) -> None:
        """Store the evidence of an answer; replaces an earlier one with the same key."""
        original = self._original_candidates(evidence)
        self.discard(evidence.key)
        lexical = evidence.lexical_candidates[: self._kept]
        frequencies = np.array(
            [[terms.frequencies.get(term, 0) for _, terms in lexical] for term in evidence.terms], dtype=int
        )
        if len(evidence.terms) > MAX_TERMS or frequencies.max(initial=0) > MAX_FREQUENCY:
            self._unmaintained[evidence.key] = self._make_unmaintained(evidence)
            return
        row = self._take_row(evidence.key)
        self._questions[row] = evidence.search.vector
        self._top_k[row] = evidence.top_k
        if evidence.top_k > self._depth:
            self._depth = evidence.top_k
            self._scratch = allocate_scratch(self._kept, self._depth)
        self._readers[row] = self._reader(evidence.search)
        chunk_ids, versions = zip(*evidence.sources, strict=True) if evidence.sources else ((), ())
        self._sources.put(row, self._numbers(chunk_ids), versions)
        vector = evidence.vector_candidates[: self._kept]
        self._vector.put(
            row,
            self._numbers(chunk_id for chunk_id, _ in vector),
            [score for _, score in vector],
            is_complete=len(evidence.vector_candidates) < evidence.search.candidates,
            original=original and original[0],
        )
        self._lexical.put(
            row,
            {self._term(term): repeats for term, repeats in evidence.terms.items()},
            self._numbers(chunk_id for chunk_id, _ in lexical),
            frequencies.astype(np.uint16).reshape(len(evidence.terms), len(lexical)),
            [length_code(terms.length) for _, terms in lexical],
            is_complete=len(evidence.lexical_candidates) < evidence.search.candidates,
            original=original and original[1],
        )

    def discard(self, key: str) -> None:
        """Remove an answer, if present."""
        self._unmaintained.pop(key, None)
        row = self._rows.pop(key, None)
        if row is not None:
            self._keys[row] = None
            self._free.append(row)
            self._vector.clear(row)
            self._lexical.clear(row)
            self._sources.clear(row)
            self._watched[row] = False

    def evaluate(self, change: Change, statistics: Statistics) -> Evaluation:
        """Apply a change, and return the answers that it alters.

        Takes time linear in the number of answers and in the number of affected candidate lists.

        Args:
            change: removed and added passages.
            statistics: current statistics; may contain only the terms whose frequencies changed.
        """
        scoring = self._update_scoring(statistics)
        verdicts = self._sweep(change, scoring)
        drop = self._keys_of(np.flatnonzero(verdicts == DROP))
        recheck = self._keys_of(np.flatnonzero(verdicts == SHORT))
        for key in drop:
            self.discard(key)
        changed_ids = change.removed.union(passage.chunk.chunk_id for passage in change.added)
        lost = frozenset(key for key, one in self._unmaintained.items() if not one.sources.isdisjoint(changed_ids))
        for key in lost:
            self.discard(key)
        return Evaluation(drop | lost, recheck.union(self._unmaintained if changed_ids else ()))

    def altered(self, keys: Iterable[str], statistics: Statistics) -> frozenset[str]:
        """Answers, out of those put again with new candidates, whose sources differ from what the candidates yield."""
        scoring = self._update_scoring(statistics)
        keys = frozenset(keys)
        differing = frozenset(key for key in keys if key in self._unmaintained and self._unmaintained[key].differs)
        rows = np.array(sorted(self._rows[key] for key in keys if key in self._rows), dtype=np.int32)
        verdicts = np.empty(len(rows), dtype=np.uint8)
        compare_rows(rows, self._vector.arrays, self._lexical.arrays, self._columns(), scoring, self._scratch, verdicts)
        return differing | self._keys_of(rows[verdicts == DROP])

    def _original_candidates(self, evidence: Evidence) -> tuple[set[int], set[int]] | None:
        """Vector and lexical candidates since the fill, for an answer that is put again with the same sources."""
        row = self._rows.get(evidence.key)
        if row is None or len(evidence.terms) > MAX_TERMS:
            return None
        current = self._sources.of(row)
        if current != {(self._passages.get(chunk_id, EMPTY), version) for chunk_id, version in evidence.sources}:
            return None
        return self._vector.original(row), self._lexical.original(row)

    def _make_unmaintained(self, evidence: Evidence) -> _Unmaintained:
        sources = frozenset(chunk_id for chunk_id, _ in evidence.sources)
        best = fused_top(
            [chunk_id for chunk_id, _ in evidence.vector_candidates],
            [chunk_id for chunk_id, _ in evidence.lexical_candidates],
            evidence.top_k,
            candidates=self._fused,
            rrf_k=self._rrf_k,
        )
        return _Unmaintained(sources, best != sources)

    def _update_scoring(self, statistics: Statistics) -> Scoring:
        for term, frequency in statistics.frequencies.items():
            if (number := self._vocabulary.get(term)) is not None:
                self._frequencies[number] = frequency
        weights = idf(self._frequencies, statistics.document_count)
        scoring = Scoring(weights, inverse_norms(statistics.average_length), self._fused, self._rrf_k)
        move_floors(self._lexical.arrays, scoring)
        return scoring

    def _sweep(self, change: Change, scoring: Scoring) -> Verdicts:
        """Apply a change to all candidates; a verdict for each row."""
        verdicts, removals = np.full(len(self._keys), KEEP, dtype=np.uint8), self._removals(change)
        if not self._rows:
            return verdicts
        verdicts[self._sources.take_changed(removals)] = DROP
        additions = self._additions(change.added)
        self._reserve(0, len(removals.by_vector.members) + len(removals.by_terms.members))
        count = find_removals(removals, self._updates)
        count = self._find_lexical_insertions(
            change.added, additions, scoring, self._find_vector_insertions(additions, count)
        )
        if len(self._ordered.rows) < count:
            self._ordered = allocate_updates(len(self._updates.rows))
        order_by_row(self._updates, count, self._ordered, self._ends)
        sweep(
            self._vector.arrays,
            self._lexical.arrays,
            self._columns(),
            scoring,
            self._scratch,
            removals,
            additions,
            self._ordered,
            self._ends,
            self._depth + EDGE_RANKS,
            self._watched,
            verdicts,
        )
        for table, kind in ((self._vector, IN_VECTOR), (self._lexical, IN_LEXICAL)):
            rows = inserted_rows(self._ordered, count, len(additions.numbers), kind)
            for at, number in enumerate(additions.numbers.tolist()):
                table.add_rows(number, rows.members[rows.bounds[at] : rows.bounds[at + 1]])
        for row in self._overflowing_rows(change.added, additions):
            verdicts[row] = max(verdicts[row], SHORT)
        return verdicts

    def _overflowing_rows(self, added: Sequence[Passage], additions: Additions) -> set[int]:
        """Rows whose score for an added passage is unknown, because a term exceeds the maximum frequency in it."""
        found: set[int] = set()
        for at, passage in enumerate(added):
            if passage.terms.length <= MAX_FREQUENCY:
                continue
            for text, count in passage.terms.frequencies.items():
                if count > MAX_FREQUENCY and (term := self._vocabulary.get(text)) is not None:
                    rows = self._lexical.holders(term) // MAX_TERMS
                    found.update(rows[additions.allowed[at, self._readers[rows]]].tolist())
        return found

    def _removals(self, change: Change) -> Removals:
        """Passages that are removed or rewritten. The sweep removes them from all candidates."""
        versions = {passage.chunk.chunk_id: passage.chunk.version for passage in change.added}
        known = [
            (chunk_id, number)
            for chunk_id in change.removed.union(versions)
            if (number := self._passages.get(chunk_id)) is not None
        ]
        for chunk_id, _ in known:
            if chunk_id not in versions:
                del self._passages[chunk_id]
        return Removals(
            np.array([number for _, number in known], dtype=np.int32),
            # Versions are not negative, so EMPTY differs from the version of every source.
            np.array([versions.get(chunk_id, EMPTY) for chunk_id, _ in known], dtype=np.int64),
            _groups([self._vector.take_rows(number) for _, number in known]),
            _groups([self._lexical.take_rows(number) for _, number in known]),
        )

    def _additions(self, added: Sequence[Passage]) -> Additions:
        counts = np.zeros((len(added), len(self._frequencies)), dtype=np.uint16)
        for of_passage, passage in zip(counts, added, strict=True):
            for text, count in passage.terms.frequencies.items():
                if (term := self._vocabulary.get(text)) is not None:
                    of_passage[term] = min(count, MAX_FREQUENCY)
        dimension, readers = self._questions.shape[1], self._reader_searches
        return Additions(
            np.array([self._number(passage.chunk.chunk_id) for passage in added], dtype=np.int32),
            np.array([passage.vector for passage in added], dtype=np.float32).reshape(len(added), dimension),
            np.array([length_code(passage.terms.length) for passage in added], dtype=np.uint8),
            counts,
            np.array([[allows(search, one.chunk) for search in readers] for one in added], dtype=bool).reshape(
                len(added), len(readers)
            ),
        )

    def _find_vector_insertions(self, additions: Additions, count: int) -> int:
        candidates, answers, passages = self._vector.arrays, self._columns(), len(additions.numbers)
        block = max(1, _UPDATES_PER_BLOCK // max(1, passages))
        for first in range(0, len(self._keys), block):
            end = min(first + block, len(self._keys))
            self._reserve(count, (end - first) * passages)
            count = find_vector_insertions(candidates, answers, first, end, additions, self._updates, count)
        return count

    def _find_lexical_insertions(
        self, passages: Sequence[Passage], additions: Additions, scoring: Scoring, count: int
    ) -> int:
        candidates, answers = self._lexical.arrays, self._columns()
        for at, passage in enumerate(passages):
            known = [self._vocabulary[text] for text in passage.terms.frequencies if text in self._vocabulary]
            frequencies, weights = additions.frequencies[at, known].astype(np.float32), scoring.weights[known]
            self._reserve(count, len(self._keys))
            count = find_lexical_insertions(
                candidates,
                answers,
                scoring,
                additions,
                at,
                _groups([self._lexical.holders(term) for term in known]),
                term_score(weights, frequencies, scoring.inverses[additions.lengths[at]]) + weights * _ROUNDING,
                self._sums,
                self._found,
                self._updates,
                count,
            )
        return count

    def _reserve(self, count: int, more: int) -> None:
        """Reserve room for ``more`` updates after the first ``count``."""
        capacity = len(self._updates.rows)
        if capacity < count + more:
            size = max(count + more, capacity + capacity // 2)
            self._updates = RowUpdates(*(grown(table[:count], size) for table in self._updates))

    def _columns(self) -> AnswerColumns:
        return AnswerColumns(self._sources.numbers, self._sources.versions, self._top_k, self._readers, self._questions)

    def _keys_of(self, rows: Any) -> frozenset[str]:
        return frozenset(key for row in rows if (key := self._keys[row]) is not None)

    def _take_row(self, key: str) -> int:
        if not self._free:
            self._grow(max(_FIRST_ROWS, len(self._keys) + len(self._keys) // 2))
        row = self._rows[key] = self._free.pop()
        self._keys[row] = key
        return row

    def _grow(self, rows: int) -> None:
        self._free += range(rows - 1, len(self._keys) - 1, -1)
        self._keys += [None] * (rows - len(self._keys))
        self._questions = grown(self._questions, rows, 0)
        self._top_k = grown(self._top_k, rows, 1)
        self._sources.grow(rows)
        self._readers = grown(self._readers, rows, 0)
        self._watched = grown(self._watched, rows, 0)
        self._sums = grown(self._sums, rows, 0)
        self._found = grown(self._found, rows)
        self._ends = grown(self._ends, rows)
        self._vector.grow(rows)
        self._lexical.grow(rows)

    def _number(self, chunk_id: str) -> int:
        number = self._passages.get(chunk_id)
        if number is None:
            number = self._passages[chunk_id] = self._next_passage
            self._next_passage += 1
        return number

    def _numbers(self, chunk_ids: Iterable[str]) -> list[int]:
        names = list(chunk_ids)
        numbers = list(map(self._passages.get, names))
        return [self._number(name) if number is None else number for name, number in zip(names, numbers, strict=True)]

    def _term(self, text: str) -> int:
        term = self._vocabulary.get(text)
        if term is None:
            term = self._vocabulary[text] = len(self._vocabulary)
            if term >= len(self._frequencies):
                self._frequencies = grown(self._frequencies, 2 * term, 0)
        return term

    def _reader(self, search: HybridSearch) -> int:
        """Number of the access rights and filters that determine which passages a search can find."""
        name = (search.access, tuple(sorted((name, repr(wanted)) for name, wanted in search.filters.items())))
        number = self._reader_numbers.get(name)
        if number is None:
            number = self._reader_numbers[name] = len(self._reader_searches)
            self._reader_searches.append(search)
        return number


def _groups(rows: Sequence[Rows]) -> Groups:
    return Groups(
        np.concatenate(rows) if rows else NO_ROWS,
        np.cumsum([0, *map(len, rows)], dtype=np.int64),
    )
