"""Order in which the versions of a batch are processed. Pure."""

from collections.abc import Sequence

from schemas.events import ChunkPlan
from streams.core.document_change import runs, supersede_within


def runs_of_plans(plans: Sequence[ChunkPlan]) -> list[tuple[tuple[object, int], int]]:
    """(run, version; see ``runs``) of each plan. A plan that already has an outcome is a run of its own."""
    incomplete = iter(runs([plan.event for plan in plans if plan.outcome is None]))
    return [(next(incomplete) if plan.outcome is None else (plan.position, 0), plan.event.version) for plan in plans]


def next_versions(versions: Sequence[tuple[tuple[object, int], int]], waiting: Sequence[int]) -> dict[int, list[int]]:
    """The versions to process next: the newest of the first incomplete run of each document.

    A later run waits, because the run before it may change the owner of the document.

    Args:
        versions: see ``runs_of_plans``.
        waiting: indices of the versions without an outcome.

    Returns:
        The index of each version to process → the indices of the older versions of its run.
    """
    first: dict[object, int] = {}
    for number in waiting:
        (document, run), _ = versions[number]
        first.setdefault(document, run)
    numbers = [number for number in waiting if first[versions[number][0][0]] == versions[number][0][1]]
    newer = supersede_within([versions[number] for number in numbers])
    newest = {versions[number][0]: number for number, version in zip(numbers, newer, strict=True) if version is None}
    older: dict[int, list[int]] = {number: [] for number in newest.values()}
    for number in numbers:
        if number not in older:
            older[newest[versions[number][0]]].append(number)
    return older
