"""Exact invalidation: drop the answers whose sources a change alters, and no other.

Each answer's windows are kept as the index would give them now (``windows``). An answer is dropped if a change removes
one of its sources or stores it in another version, or brings into its fused top k a passage that was not there when it
was made. Where passages that were there take each other's places, because statistics moved or one that is no source
left, it is kept: that is drift of ranks, and no content that anyone changed. Windows that removals have made shorter
than what is fused: retrieve again to tell.

The vector leg is a product of all questions with all added passages, each question read once. The lexical leg goes
from the terms of an added passage to the questions that have them. Only answers that something near their tops left or
entered are looked at further (``compiled``).
"""

from collections.abc import Iterable, KeysView, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from schemas.search import HybridSearch, allows
from streams.core.invalidation.bm25 import idf, inverse_norms, length_code, share
from streams.core.invalidation.compiled import (
    MOST_COUNTED,
    NOBODY,
    Answered,
    Fusion,
    Groups,
    Leavers,
    Newcomers,
    move_floors,
    scratch_of,
)
from streams.core.invalidation.evidence import Change, Evidence, Passage, Statistics, Verdict
from streams.core.invalidation.fused import top_of
from streams.core.invalidation.rows import NO_ROWS, Rows, grown
from streams.core.invalidation.sweep import (
    IN_LEXICAL,
    IN_VECTOR,
    Touches,
    by_row,
    entered,
    find_by_terms,
    find_by_vector,
    find_leavers,
    sweep,
    touches_of,
)
from streams.core.invalidation.verdicts import DROP, EDGE, KEEP, SHORT, Verdicts, compare_rows
from streams.core.invalidation.windows import LexicalWindows, VectorWindows

MAX_TERMS: Final = 16
"""Different terms of a question that is judged; one with more is retrieved again at each change."""

_FIRST_ROWS: Final = 256
_TOUCHES_AT_ONCE: Final = 1 << 18
"""Pairs of a row and a new passage; so a large change takes no room for all of them."""
_ROUNDED: Final = np.float32(1e-6)
"""Part of a term's weight by which what it is worth differs at most, asked several times at once or one by one."""


@dataclass(frozen=True, slots=True)
class _Long:
    """An answer whose windows are not kept: the question has too many terms, or a passage has one of them too often.

    Attributes:
        sources: ids of its passages.
        differs: whether the windows that it was put with lead to others.
    """

    sources: frozenset[str]
    differs: bool


class Exact:
    """See ``Policy``. One thread at a time may use it; judging lets others run.

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
        self._deepest = fused
        self._rows: dict[str, int] = {}
        self._keys: list[str | None] = []
        self._free: list[int] = []
        self._questions = np.empty((0, dimension), dtype=np.float32)
        self._top_k = np.empty(0, dtype=np.int16)
        self._sources = np.empty((0, 1), dtype=np.int32)
        self._versions = np.empty((0, 1), dtype=np.int64)
        self._readers = np.empty(0, dtype=np.int32)
        self._watched = np.empty(0, dtype=bool)  # looked at at each change, whether it touches them or not
        self._vector = VectorWindows(kept)
        self._lexical = LexicalWindows(kept, MAX_TERMS)
        # What a call works with; nothing in it outlasts the call.
        self._sums = np.empty(0, dtype=np.float32)
        self._found = np.empty(0, dtype=np.int32)
        self._ends = np.empty(0, dtype=np.int64)
        self._scratch = scratch_of(kept, self._deepest)
        self._touches, self._ordered = touches_of(0), touches_of(0)
        self._passages: dict[str, int] = {}
        self._next_passage = 0
        self._reader_numbers: dict[object, int] = {}
        self._reader_searches: list[HybridSearch] = []
        # Term 0 is no term: it ends the terms of a question.
        self._vocabulary: dict[str, int] = {"": 0}
        self._frequencies = np.zeros(1, dtype=np.int64)
        self._long: dict[str, _Long] = {}

    def __len__(self) -> int:
        return len(self._rows) + len(self._long)

    @property
    def vocabulary(self) -> KeysView[str]:
        """The terms of the questions: whose frequencies matter."""
        return self._vocabulary.keys()

    @property
    def size_bytes(self) -> int:
        """Of the arrays that grow with the answers, without room that is kept for more of them."""
        share = len(self._rows) / max(len(self._keys), 1)
        own: list[NDArray[Any]] = [*self._answered(), self._watched, self._sums, self._found]
        own.append(self._ends)
        tables = round(share * sum(table.nbytes for table in own))
        return tables + self._vector.size_bytes(share) + self._lexical.size_bytes(share)

    def put(self, evidence: Evidence) -> None:
        """See ``Policy``."""
        settled = self._settled(evidence)
        self.discard(evidence.key)
        lexical = evidence.lexical_window[: self._kept]
        held = [counts.frequencies for _, counts in lexical]
        counts = np.array([[frequencies.get(term, 0) for frequencies in held] for term in evidence.terms], dtype=int)
        if len(evidence.terms) > MAX_TERMS or counts.max(initial=0) > MOST_COUNTED:
            self._long[evidence.key] = self._unmaintained(evidence)
            return
        row = self._take_row(evidence.key)
        self._questions[row] = evidence.search.vector
        self._top_k[row] = evidence.top_k
        if evidence.top_k > self._deepest:
            self._deepest = evidence.top_k
            self._scratch = scratch_of(self._kept, self._deepest)
        self._readers[row] = self._reader(evidence.search)
        count = len(evidence.sources)
        if count > self._sources.shape[1]:
            self._widen(count)
        self._sources[row], self._versions[row] = NOBODY, NOBODY
        self._sources[row, :count] = self._numbers(chunk_id for chunk_id, _ in evidence.sources)
        self._versions[row, :count] = [version for _, version in evidence.sources]
        vector = evidence.vector_window[: self._kept]
        self._vector.put(
            row,
            self._numbers(chunk_id for chunk_id, _ in vector),
            [score for _, score in vector],
            whole=len(evidence.vector_window) < evidence.search.window,
            settled=settled and settled[0],
        )
        self._lexical.put(
            row,
            {self._term(term): repeats for term, repeats in evidence.terms.items()},
            self._numbers(chunk_id for chunk_id, _ in lexical),
            counts.astype(np.uint16).reshape(len(evidence.terms), len(lexical)),
            [length_code(counts.length) for _, counts in lexical],
            whole=len(evidence.lexical_window) < evidence.search.window,
            settled=settled and settled[1],
        )

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
            self._watched[row] = False

    def judge(self, change: Change, statistics: Statistics) -> Verdict:
        """See ``Policy``. Costs time linear in the number of answers, and in that of windows that are touched."""
        fusion = self._learn(statistics)
        verdicts = self._swept(change, fusion)
        drop = self._keys_of(np.flatnonzero(verdicts == DROP))
        recheck = self._keys_of(np.flatnonzero(verdicts == SHORT))
        for key in drop:
            self.discard(key)
        touched_ids = change.removed.union(passage.chunk.chunk_id for passage in change.added)
        lost = frozenset(key for key, one in self._long.items() if not one.sources.isdisjoint(touched_ids))
        for key in lost:
            self.discard(key)
        return Verdict(drop | lost, recheck.union(self._long if touched_ids else ()))

    def altered(self, keys: Iterable[str], statistics: Statistics) -> frozenset[str]:
        """Of answers whose windows were put anew, those whose sources are not what the windows lead to."""
        fusion = self._learn(statistics)
        keys = frozenset(keys)
        other = frozenset(key for key in keys if key in self._long and self._long[key].differs)
        rows = np.array(sorted(self._rows[key] for key in keys if key in self._rows), dtype=np.int32)
        verdicts = np.empty(len(rows), dtype=np.uint8)
        compare_rows(rows, self._vector.leg, self._lexical.leg, self._answered(), fusion, self._scratch, verdicts)
        return other | self._keys_of(rows[verdicts == DROP])

    def _settled(self, evidence: Evidence) -> tuple[set[int], set[int]] | None:
        """Of an answer that is put again with the sources it has, what was in each leg's window when it was made."""
        row = self._rows.get(evidence.key)
        if row is None or len(evidence.terms) > MAX_TERMS:
            return None
        standing = {
            (number, version)
            for number, version in zip(self._sources[row].tolist(), self._versions[row].tolist(), strict=True)
            if number != NOBODY
        }
        if standing != {(self._passages.get(chunk_id, NOBODY), version) for chunk_id, version in evidence.sources}:
            return None
        return self._vector.settled(row), self._lexical.settled(row)

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

    def _learn(self, statistics: Statistics) -> Fusion:
        for term, frequency in statistics.frequencies.items():
            if (number := self._vocabulary.get(term)) is not None:
                self._frequencies[number] = frequency
        weights = idf(self._frequencies, statistics.document_count)
        fusion = Fusion(weights, inverse_norms(statistics.average_length), self._fused, self._rrf_k)
        move_floors(self._lexical.leg, fusion)
        return fusion

    def _swept(self, change: Change, fusion: Fusion) -> Verdicts:
        """Bring all windows to what they are after the change; a verdict for each row."""
        verdicts, gone = np.full(len(self._keys), KEEP, dtype=np.uint8), self._leavers(change)
        if not self._rows:
            return verdicts
        new = self._newcomers(change.added)
        self._have_room(0, len(gone.by_vector.members) + len(gone.by_terms.members))
        count = find_leavers(gone, self._touches)
        count = self._find_by_terms(change.added, new, fusion, self._find_by_vector(new, count))
        if len(self._ordered.rows) < count:
            self._ordered = touches_of(len(self._touches.rows))
        by_row(self._touches, count, self._ordered, self._ends)
        sweep(
            self._vector.leg,
            self._lexical.leg,
            self._answered(),
            fusion,
            self._scratch,
            gone,
            new,
            self._ordered,
            self._ends,
            self._deepest + EDGE,
            self._watched,
            verdicts,
        )
        for windows, leg in ((self._vector, IN_VECTOR), (self._lexical, IN_LEXICAL)):
            rows = entered(self._ordered, count, len(new.numbers), leg)
            for at, number in enumerate(new.numbers.tolist()):
                windows.entered(number, rows.members[rows.bounds[at] : rows.bounds[at + 1]])
        for row in self._uncounted(change.added, new):
            verdicts[row] = max(verdicts[row], SHORT)
        return verdicts

    def _uncounted(self, added: Sequence[Passage], new: Newcomers) -> set[int]:
        """Rows that may find a passage by a term that it has more often than is counted: its score is not known."""
        found: set[int] = set()
        for at, passage in enumerate(added):
            if passage.terms.length <= MOST_COUNTED:
                continue
            for text, count in passage.terms.frequencies.items():
                if count > MOST_COUNTED and (term := self._vocabulary.get(text)) is not None:
                    rows = self._lexical.holders(term) // MAX_TERMS
                    found.update(rows[new.allowed[at, self._readers[rows]]].tolist())
        return found

    def _leavers(self, change: Change) -> Leavers:
        """What is gone and what is stored anew; it is in no window any more, once they are swept."""
        versions = {passage.chunk.chunk_id: passage.chunk.version for passage in change.added}
        known = [
            (chunk_id, number)
            for chunk_id in change.removed.union(versions)
            if (number := self._passages.get(chunk_id)) is not None
        ]
        for chunk_id, _ in known:
            if chunk_id not in versions:
                del self._passages[chunk_id]
        return Leavers(
            np.array([number for _, number in known], dtype=np.int32),
            # No version is below zero: a removed source is never the same.
            np.array([versions.get(chunk_id, NOBODY) for chunk_id, _ in known], dtype=np.int64),
            _groups([self._vector.take_out(number) for _, number in known]),
            _groups([self._lexical.take_out(number) for _, number in known]),
        )

    def _newcomers(self, added: Sequence[Passage]) -> Newcomers:
        counts = np.zeros((len(added), len(self._frequencies)), dtype=np.uint16)
        for of_passage, passage in zip(counts, added, strict=True):
            for text, count in passage.terms.frequencies.items():
                if (term := self._vocabulary.get(text)) is not None:
                    of_passage[term] = min(count, MOST_COUNTED)
        dimension, readers = self._questions.shape[1], self._reader_searches
        return Newcomers(
            np.array([self._number(passage.chunk.chunk_id) for passage in added], dtype=np.int32),
            np.array([passage.vector for passage in added], dtype=np.float32).reshape(len(added), dimension),
            np.array([length_code(passage.terms.length) for passage in added], dtype=np.uint8),
            counts,
            np.array([[allows(search, one.chunk) for search in readers] for one in added], dtype=bool).reshape(
                len(added), len(readers)
            ),
        )

    def _find_by_vector(self, new: Newcomers, count: int) -> int:
        leg, answered, passages = self._vector.leg, self._answered(), len(new.numbers)
        block = max(1, _TOUCHES_AT_ONCE // max(1, passages))
        for first in range(0, len(self._keys), block):
            end = min(first + block, len(self._keys))
            self._have_room(count, (end - first) * passages)
            count = find_by_vector(leg, answered, first, end, new, self._touches, count)
        return count

    def _find_by_terms(self, passages: Sequence[Passage], new: Newcomers, fusion: Fusion, count: int) -> int:
        leg, answered = self._lexical.leg, self._answered()
        for at, passage in enumerate(passages):
            known = [self._vocabulary[text] for text in passage.terms.frequencies if text in self._vocabulary]
            held, weights = new.frequencies[at, known].astype(np.float32), fusion.weights[known]
            self._have_room(count, len(self._keys))
            count = find_by_terms(
                leg,
                answered,
                fusion,
                new,
                at,
                _groups([self._lexical.holders(term) for term in known]),
                share(weights, held, fusion.inverses[new.lengths[at]]) + weights * _ROUNDED,
                self._sums,
                self._found,
                self._touches,
                count,
            )
        return count

    def _have_room(self, count: int, more: int) -> None:
        """For ``more`` touches beside the ``count`` that are noted."""
        have = len(self._touches.rows)
        if have < count + more:
            room = max(count + more, have + have // 2)
            self._touches = Touches(*(grown(table[:count], room) for table in self._touches))

    def _answered(self) -> Answered:
        return Answered(self._sources, self._versions, self._top_k, self._readers, self._questions)

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
        self._sources = grown(self._sources, rows, NOBODY)
        self._versions = grown(self._versions, rows, NOBODY)
        self._readers = grown(self._readers, rows, 0)
        self._watched = grown(self._watched, rows, 0)
        self._sums = grown(self._sums, rows, 0)
        self._found = grown(self._found, rows)
        self._ends = grown(self._ends, rows)
        self._vector.grow(rows)
        self._lexical.grow(rows)

    def _widen(self, sources: int) -> None:
        more = ((0, 0), (0, sources - self._sources.shape[1]))
        self._sources = np.pad(self._sources, more, constant_values=NOBODY)
        self._versions = np.pad(self._versions, more, constant_values=NOBODY)

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
        """Number of those who may find the same passages."""
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
