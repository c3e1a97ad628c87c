"""What is read of the index once, though many read at the same time."""

import asyncio

from infra.opensearch.port import IndexUnavailable
from schemas.documents import DocumentKey
from schemas.search import Hit
from streams import term_cache as module
from streams.term_cache import TermCache


class Terms:
    """An index that answers each call when the test permits it."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], asyncio.Event]] = []
        self.failing = False
        self.there = set("abcd")

    async def term_counts(self, hits):
        if self.failing:
            raise IndexUnavailable("gone")
        reported, there = asyncio.Event(), frozenset(self.there)
        self.asked.append(([hit.chunk_id for hit in hits], reported))
        await reported.wait()
        return {hit.chunk_id: {f"term-{hit.chunk_id}": 1} for hit in hits if hit.chunk_id in there}


def hits(*names):
    return [Hit(name, DocumentKey("acme", "doc"), 1.0) for name in names]


async def asked(terms, count):
    async with asyncio.timeout(5):
        while len(terms.asked) < count:  # noqa: ASYNC110 - how far the others are
            await asyncio.sleep(0)


async def test_what_another_call_lets_go_of_is_still_found(monkeypatch):
    monkeypatch.setattr(module, "PASSAGES_KEPT", 2)
    terms = Terms()
    cache = TermCache(terms)
    first = asyncio.create_task(cache.passages(hits("a")))
    await asked(terms, 1)
    terms.asked[0][1].set()
    await first
    slow = asyncio.create_task(cache.passages(hits("a", "b")))
    await asked(terms, 2)
    quick = asyncio.create_task(cache.passages(hits("c", "d")))
    await asked(terms, 3)
    terms.asked[2][1].set()
    assert set(await quick) == {"c", "d"}
    terms.asked[1][1].set()
    found = await slow
    assert {name: counts.frequencies[f"term-{name}"] for name, counts in found.items()} == {"a": 1, "b": 1}
    assert terms.asked[1][0] == ["b"]


async def test_what_is_in_progress_is_not_asked_for_again():
    terms = Terms()
    cache = TermCache(terms)
    leaves = asyncio.create_task(cache.passages(hits("a", "b")))
    await asked(terms, 1)
    stays = asyncio.create_task(cache.passages(hits("b", "c")))
    await asked(terms, 2)
    leaves.cancel()
    for _, reported in terms.asked:
        reported.set()
    assert set(await stays) == {"b", "c"}
    assert [sorted(names) for names, _ in terms.asked] == [["a", "b"], ["c"]]


async def test_what_could_not_be_read_is_asked_for_again():
    terms = Terms()
    cache = TermCache(terms)
    terms.failing = True
    both = await asyncio.gather(cache.passages(hits("a")), cache.passages(hits("a")), return_exceptions=True)
    assert [type(one) for one in both] == [IndexUnavailable, IndexUnavailable]
    terms.failing = False
    again = asyncio.create_task(cache.passages(hits("a")))
    await asked(terms, 1)
    terms.asked[0][1].set()
    assert set(await again) == {"a"}


async def test_what_became_searchable_meanwhile_is_not_taken_for_absent():
    """A read that began before it did is no answer for those who ask later."""
    terms = Terms()
    cache = TermCache(terms)
    terms.there = set()
    early = asyncio.create_task(cache.passages(hits("a")))
    await asked(terms, 1)
    terms.there = {"a"}
    late = asyncio.create_task(cache.passages(hits("a")))
    await asyncio.sleep(0)
    terms.asked[0][1].set()
    assert await early == {}
    await asked(terms, 2)
    terms.asked[1][1].set()
    assert set(await late) == {"a"}


async def test_what_was_stored_again_is_read_again_also_where_a_read_of_it_is_in_progress():
    terms = Terms()
    cache = TermCache(terms)
    early = asyncio.create_task(cache.passages(hits("a", "b")))
    await asked(terms, 1)
    cache.forget("a")
    late = asyncio.create_task(cache.passages(hits("a", "b")))
    await asked(terms, 2)
    assert terms.asked[1][0] == ["a"], "the other one is as it was"
    for _, reported in terms.asked:
        reported.set()
    assert set(await early) == set(await late) == {"a", "b"}
    cache.forget("a")
    again = asyncio.create_task(cache.passages(hits("a", "b")))
    await asked(terms, 3)
    assert terms.asked[2][0] == ["a"], "what was known is forgotten too"
    terms.asked[2][1].set()
    assert set(await again) == {"a", "b"}


async def test_a_read_that_is_older_than_what_was_stored_is_not_kept():
    terms = Terms()
    cache = TermCache(terms)
    early = asyncio.create_task(cache.passages(hits("a")))
    await asked(terms, 1)
    cache.forget_passages()
    terms.asked[0][1].set()
    assert set(await early) == {"a"}
    late = asyncio.create_task(cache.passages(hits("a")))
    await asked(terms, 2)
    terms.asked[1][1].set()
    assert set(await late) == {"a"}
