"""The round-robin queue of texts to embed: each text once, bounded batches, equal shares."""

from hypothesis import given
from hypothesis import strategies as st

from infra.embedding.round_robin import RoundRobinQueue

CALLS = st.lists(st.lists(st.text("abc", min_size=1, max_size=3), max_size=12), max_size=8)


def drain(queue: RoundRobinQueue, limit: int) -> list[list[str]]:
    started: set[str] = set()
    batches = []
    while batch := queue.take(limit, lambda text: text not in started):
        started.update(batch)
        batches.append(batch)
    return batches


@given(CALLS, st.integers(1, 10))
def test_each_text_is_taken_once_in_bounded_batches_longest_first(calls: list[list[str]], limit: int):
    queue = RoundRobinQueue()
    for call in calls:
        queue.add(call)
    batches = drain(queue, limit)
    assert sorted(text for batch in batches for text in batch) == sorted({text for call in calls for text in call})
    assert all(len(batch) == limit for batch in batches[:-1])
    assert all(len(batch) <= limit for batch in batches)
    assert all(batch == sorted(batch, key=len, reverse=True) for batch in batches)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 10))
def test_waiting_calls_have_equal_shares(sizes: list[int], limit: int):
    queue = RoundRobinQueue()
    for call, size in enumerate(sizes):
        queue.add(f"{call}:{text}" for text in range(size))
    taken = [0] * len(sizes)
    for batch in drain(queue, limit):
        for text in batch:
            taken[int(text.partition(":")[0])] += 1
        waiting = [count for count, size in zip(taken, sizes, strict=True) if count < size]
        assert not waiting or max(taken) <= min(waiting) + 1


@given(CALLS, st.sets(st.text("abc", min_size=1, max_size=3)))
def test_unwanted_texts_are_dropped(calls: list[list[str]], unwanted: set[str]):
    queue = RoundRobinQueue()
    for call in calls:
        queue.add(call)
    taken = queue.take(1_000, lambda text: text not in unwanted)
    assert set(taken) == {text for call in calls for text in call} - unwanted
    assert queue.take(1_000, lambda _: True) == []
