"""Plot of invalidation policies."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pygal

_POINTS: Final = 240
"""Maximum points of each line; each is the mean of several edits."""
_LINEAR_BELOW: Final = 1e-4
"""The scale is linear below and logarithmic above, so that both 0 and 0.01 % are visible."""
_LABELS: Final = {0.0: "0", 1e-4: "0.01 %", 1e-3: "0.1 %", 1e-2: "1 %", 0.1: "10 %", 1.0: "100 %"}


def stale_rates(figures: Sequence[Mapping[str, Any]]) -> bytes:
    """Content-stale answers in the steady state over the edits, one line per policy, as SVG."""
    chart = pygal.XY(
        title="Content-stale answers, steady state",
        x_title="edits",
        legend_at_bottom=True,
        show_dots=False,
        js=[],  # no external scripts
        range=(0, _height(1.0)),
        no_prefix=True,
    )
    chart.y_labels = [{"value": _height(rate), "label": label} for rate, label in _LABELS.items()]
    for one in figures:
        rates: list[float] = one["stale_rate_after_each_edit"]
        step = max(1, -(-len(rates) // _POINTS))
        groups = [rates[start : start + step] for start in range(0, len(rates), step)]
        chart.add(
            one["policy"],
            [
                (min((number + 1) * step, len(rates)), round(_height(sum(group) / len(group)), 3))
                for number, group in enumerate(groups)
            ],
        )
    rendered: bytes = chart.render()
    return rendered


def _height(rate: float) -> float:
    return math.log10(1 + rate / _LINEAR_BELOW)
