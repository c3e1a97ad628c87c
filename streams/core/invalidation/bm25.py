"""Lucene's BM25 over arrays, bit for bit.

Each operation has the precision and the order of Lucene's, so that equal scores there are equal here, and the order of
different scores is the same. A term score is single precision, the sum is double precision, and the result is single
precision.

A passage's length is stored in one byte, so scores use lengths of reduced precision (``SmallFloat.intToByte4`` of
Lucene 10). k1 and b are OpenSearch's defaults. There is no factor k1 + 1: Lucene dropped it in version 8, OpenSearch in
version 3.
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
"""Length code → the length that scores use."""


def length_code(length: int) -> int:
    """The stored form of a length: the largest code whose length does not exceed it."""
    return bisect_right(_LENGTHS, length) - 1


def idf(document_frequency: NDArray[Any], document_count: int) -> Floats:
    """Weight of terms by document frequency.

    Args:
        document_frequency: number of passages that contain each term.
        document_count: number of all passages.
    """
    frequency = document_frequency.astype(np.float64)
    # A frequency that is read after the count can exceed it by concurrent additions.
    total = np.maximum(float(document_count), frequency)
    return np.asarray(np.log(1 + (total - frequency + 0.5) / (frequency + 0.5)), dtype=np.float32)


def inverse_norms(average_length: float) -> Floats:
    """Length code → the factor of a frequency in ``term_score``."""
    return np.asarray(1 / (K1 * ((1 - B) + B * LENGTHS / np.float32(average_length))), dtype=np.float32)


def term_score(weight: Any, frequency: Any, inverse: Any) -> Any:
    """Contribution of a term to a score, in single precision.

    Args:
        weight: ``idf`` of the term, times its occurrences in the question.
        frequency: occurrences in the passage.
        inverse: ``inverse_norms`` of the passage's length.
    """
    return weight - weight / (np.float32(1) + frequency * inverse)
