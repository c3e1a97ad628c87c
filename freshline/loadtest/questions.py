"""What is asked: questions of a file, some far more often than others."""

import bisect
import gzip
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import orjson


class BadQuestionFile(ValueError):
    """A line is no question, or there is none; the message tells which line."""


def read_questions(path: Path) -> list[str]:
    """Distinct questions in their order.

    Args:
        path: lines of JSON with ``text``, or plain lines; gzipped where it ends in ``.gz``.

    Raises:
        BadQuestionFile: see there.
    """
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    texts: dict[str, None] = {}
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if plain.suffix == ".jsonl":
                texts.setdefault(_text(path, number, line))
            else:
                texts.setdefault(line.decode("utf-8", "replace").strip())
    if not texts:
        raise BadQuestionFile(f"{path.name} has no questions")
    return list(texts)


def _text(path: Path, number: int, line: bytes) -> str:
    try:
        text = orjson.loads(line)["text"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str) or not text.strip():
        raise BadQuestionFile(f'{path.name} line {number} is no question: {{"text": …}} is expected')
    return text.strip()


class Zipf:
    """Draws from items as people draw: the item of rank r is r^s times as rare as the first.

    Args:
        items: in any order; their ranks are drawn too.
        skew: s; 0 makes all equally frequent.
        seed: of ranks and draws.
    """

    def __init__(self, items: Sequence[bytes], *, skew: float, seed: int) -> None:
        self._chance = random.Random(seed)  # noqa: S311 - load, not secrets
        self._items = list(items)
        self._chance.shuffle(self._items)
        weights = (rank**-skew for rank in range(1, len(self._items) + 1))
        self._reached = list(itertools.accumulate(weights))

    def __call__(self) -> bytes:
        """The next one."""
        place = bisect.bisect(self._reached, self._chance.random() * self._reached[-1])
        return self._items[min(place, len(self._items) - 1)]
