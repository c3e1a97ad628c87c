"""Question files, and Zipf-distributed draws."""

import bisect
import gzip
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import orjson


class BadQuestionFile(ValueError):
    """A line is no question, or there are none. The message names the line."""


def read_questions(path: Path) -> list[str]:
    """Distinct questions, in file order.

    Args:
        path: JSON Lines with ``text``, or plain lines; gzipped if the name ends in ``.gz``.

    Raises:
        BadQuestionFile: a line is no question, or there are none.
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
    """Zipf-distributed draws: the item of rank r is drawn r^s times less often than the first.

    Args:
        items: in any order; ranks are assigned randomly.
        skew: s; 0 for a uniform distribution.
        seed: seed of ranks and draws.
    """

    def __init__(self, items: Sequence[bytes], *, skew: float, seed: int) -> None:
        self._rng = random.Random(seed)  # noqa: S311 - load, not secrets
        self._items = list(items)
        self._rng.shuffle(self._items)
        weights = (rank**-skew for rank in range(1, len(self._items) + 1))
        self._cumulative = list(itertools.accumulate(weights))

    def __call__(self) -> bytes:
        """The next item."""
        index = bisect.bisect(self._cumulative, self._rng.random() * self._cumulative[-1])
        return self._items[min(index, len(self._items) - 1)]
