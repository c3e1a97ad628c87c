"""The queue in turns, against what it promises."""

from hypothesis import given
from hypothesis import strategies as st

from infra.embedding.round_robin import RoundRobinQueue

CALLS = st.lists(st.lists(st.text("abc", min_size=1, max_size=3), max_size=12), max_size=8)


def drain(turns: RoundRobinQueue, limit: int) -> list[list[str]]:
    started: set[str] = set()
    goes = []
    while go := turns.take(limit, lambda text: text not in started):
        started.update(go)
        goes.append(go)
    return goes


@given(CALLS, st.integers(1, 10))
def test_each_text_is_taken_once_in_bounded_goes_longest_first(calls: list[list[str]], limit: int):
    turns = RoundRobinQueue()
    for call in calls:
        turns.add(call)
    goes = drain(turns, limit)
    assert sorted(text for go in goes for text in go) == sorted({text for call in calls for text in call})
    assert all(len(go) == limit for go in goes[:-1])
    assert all(len(go) <= limit for go in goes)
    assert all(go == sorted(go, key=len, reverse=True) for go in goes)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 10))
def test_no_call_is_more_than_a_turn_ahead(sizes: list[int], limit: int):
    turns = RoundRobinQueue()
    for call, size in enumerate(sizes):
        turns.add(f"{call}:{text}" for text in range(size))
    taken = [0] * len(sizes)
    for go in drain(turns, limit):
        for text in go:
            taken[int(text.partition(":")[0])] += 1
        waiting = [count for count, size in zip(taken, sizes, strict=True) if count < size]
        assert not waiting or max(taken) <= min(waiting) + 1


@given(CALLS, st.sets(st.text("abc", min_size=1, max_size=3)))
def test_what_is_not_wanted_is_dropped(calls: list[list[str]], unwanted: set[str]):
    turns = RoundRobinQueue()
    for call in calls:
        turns.add(call)
    taken = turns.take(1_000, lambda text: text not in unwanted)
    assert set(taken) == {text for call in calls for text in call} - unwanted
    assert turns.take(1_000, lambda _: True) == []
