"""When the interpreter looks for cycles."""

import gc
from typing import Final

_AFTER: Final = 100_000
"""New containers in all, between looks."""


def tune_gc() -> None:
    """Look for cycles seldom, and not among what is there already: to be called when a process has begun.

    What an index or a cache tells is thousands of objects, none in a cycle. Looking at them again and again, and with
    them at all that is kept, took a fifth of the processor time of a miss, and more of what it takes to read evidence.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_AFTER, 50, 50)
