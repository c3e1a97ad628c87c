"""Tuning of the garbage collector."""

import gc
from typing import Final

_THRESHOLD: Final = 100_000
"""Allocations of containers between collections of the youngest generation."""


def tune_gc() -> None:
    """Collect rarely, and exclude existing objects from collections. To be called once a process has started.

    Responses of the index and of Redis are thousands of objects without cycles. With the default thresholds, repeated
    collections took a fifth of the processor time of a cache miss, and more of decoding evidence.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_THRESHOLD, 50, 50)
