"""Lucene's BM25, bit for bit, over arrays.

Each step is made in the precision and the order of Lucene's: of two passages that score the same there, none must score
more here, nor one of them less that scores more there. A term's share is single precision, their sum is double, and the
score that is compared is single again.

A passage's length is stored in one byte, so scores are made of lengths that lost precision (``SmallFloat.intToByte4``
of Lucene 10); whoever compares scores must lose it likewise. k1 and b are OpenSearch's defaults, and there is no factor
k1 + 1: Lucene dropped it in version 8, OpenSearch in version 3.
"""

from bisect import bisect_right
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

K1: Final = 1.2
B: Final = 0.75


def _encodable(code: int) -> int:
    bits, shift = code & 7, (code >> 3) - 1
    return bits if shift < 0 else (bits | 8) << shift


_EXACT_LENGTHS: Final = 24


def _length_of(code: int) -> int:
    return code if code < _EXACT_LENGTHS else _EXACT_LENGTHS + _encodable(code - _EXACT_LENGTHS)


_LENGTHS: Final = [_length_of(code) for code in range(256)]

LENGTHS: Final[Floats] = np.array(_LENGTHS, dtype=np.float32)
"""Code of a length → the length that scores are made of."""


def length_code(length: int) -> int:
    """The stored form of a length: the largest code whose length is not above it."""
    return bisect_right(_LENGTHS, length) - 1


def idf(document_frequency: NDArray[Any], document_count: int) -> Floats:
    """Weight of terms that so many of ``document_count`` passages hold."""
    held = document_frequency.astype(np.float64)
    # A frequency read after the count may be above it by what was added between.
    total = np.maximum(float(document_count), held)
    return np.asarray(np.log(1 + (total - held + 0.5) / (held + 0.5)), dtype=np.float32)


def inverse_norms(average_length: float) -> Floats:
    """Code of a length → what a frequency is multiplied by in ``share``."""
    return np.asarray(1 / (K1 * ((1 - B) + B * LENGTHS / np.float32(average_length))), dtype=np.float32)


def share(weight: Any, frequency: Any, inverse: Any) -> Any:
    """What a term adds to scores, all in single precision.

    Args:
        weight: its ``idf``, times how often it is asked.
        frequency: how often the passage has it.
        inverse: of the passage's length.
    """
    return weight - weight / (np.float32(1) + frequency * inverse)
