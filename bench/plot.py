"""The figures of policies of invalidation as a picture."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pygal

_POINTS: Final = 240
"""Of each line at most: each is then the mean of some edits."""
_LINEAR_BELOW: Final = 1e-4
"""Shares below are drawn by their size, those above by their logarithm: 0 and 0.01 % are both seen."""
_SHARES: Final = {0.0: "0", 1e-4: "0.01 %", 1e-3: "0.1 %", 1e-2: "1 %", 0.1: "10 %", 1.0: "100 %"}


def stale_shares(figures: Sequence[Mapping[str, Any]]) -> bytes:
    """Content-stale share at rest over the edits, a line for each policy, as SVG."""
    chart = pygal.XY(
        title="Content-stale answers at rest",
        x_title="edits",
        legend_at_bottom=True,
        show_dots=False,
        js=[],  # nothing is loaded from elsewhere
        range=(0, _height(1.0)),
        no_prefix=True,
    )
    chart.y_labels = [{"value": _height(share), "label": label} for share, label in _SHARES.items()]
    for one in figures:
        shares: list[float] = one["stale_share_after_each_edit"]
        step = max(1, -(-len(shares) // _POINTS))
        groups = [shares[start : start + step] for start in range(0, len(shares), step)]
        chart.add(
            one["policy"],
            [
                (min((number + 1) * step, len(shares)), round(_height(sum(group) / len(group)), 3))
                for number, group in enumerate(groups)
            ],
        )
    rendered: bytes = chart.render()
    return rendered


def _height(share: float) -> float:
    return math.log10(1 + share / _LINEAR_BELOW)
