"""Terms of passages and questions, as the index makes them, asked for once."""

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from sys import intern
from typing import Final, TypeVar

from infra.opensearch.port import Hit, TermIndex
from streams.core.invalidation.evidence import Statistics, TermCounts

T = TypeVar("T")

PASSAGES_KEPT: Final = 20_000
QUESTIONS_KEPT: Final = 20_000


class Lexicon:
    """What the index makes of texts.

    A passage's id is made of its text, and the analyser of an index never changes, so nothing that is kept here ages.
    """

    def __init__(self, index: TermIndex) -> None:
        self._index = index
        self._passages: OrderedDict[str, TermCounts] = OrderedDict()
        self._questions: OrderedDict[str, Mapping[str, int]] = OrderedDict()

    async def passages(self, hits: Sequence[Hit]) -> dict[str, TermCounts]:
        """Terms by chunk id; a passage that is not there any more may be absent.

        Raises:
            IndexUnavailable: see there.
        """
        wanted = {hit.chunk_id: hit for hit in hits}
        missing = [hit for chunk_id, hit in wanted.items() if chunk_id not in self._passages]
        # Of these alone: what is let go of to make room may be wanted in the same call.
        found = {chunk_id: self._passages[chunk_id] for chunk_id in wanted if chunk_id in self._passages}
        for chunk_id, counts in (await self._index.term_counts(missing)).items():
            found[chunk_id] = TermCounts.of({intern(term): count for term, count in counts.items()})
        _keep(self._passages, found, PASSAGES_KEPT)
        return found

    async def questions(self, texts: Collection[str]) -> dict[str, Mapping[str, int]]:
        """Terms of each question.

        Raises:
            IndexUnavailable: see there.
        """
        missing = [text for text in dict.fromkeys(texts) if text not in self._questions]
        found = {text: self._questions[text] for text in texts if text in self._questions}
        found |= zip(missing, await self._index.analysed(missing), strict=True)
        _keep(self._questions, found, QUESTIONS_KEPT)
        return found

    async def statistics(self, terms: Collection[str]) -> Statistics:
        """Statistics of this moment.

        Raises:
            IndexUnavailable: see there.
        """
        told = await self._index.statistics(terms)
        return Statistics(told.document_count, told.total_length, told.frequencies)


def _keep(kept: OrderedDict[str, T], found: Mapping[str, T], most: int) -> None:
    """What was used last stays. Another call may have let go of any of it meanwhile."""
    for name, one in found.items():
        kept[name] = one
        kept.move_to_end(name)
    while len(kept) > most:
        kept.popitem(last=False)
