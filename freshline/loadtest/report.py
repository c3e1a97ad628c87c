"""Load test report: a table and a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pygal

_COLUMNS: Final = (
    ("users", "users"),
    ("success rate", "success_rate"),
    ("answers/s", "answers_per_s"),
    ("mean ms", "mean_ms"),
    ("p50 ms", "p50_ms"),
    ("p95 ms", "p95_ms"),
    ("p99 ms", "p99_ms"),
    ("hit rate", "hit_rate"),
    ("staleness p50 ms", "staleness_p50_ms"),
    ("staleness p99 ms", "staleness_p99_ms"),
    ("SLO violations", "slo_violations"),
)


def write_report(folder: Path, report: Mapping[str, Any], as_json: bytes) -> list[Path]:
    """Write ``loadtest.json``, ``loadtest.md`` and ``loadtest.svg``. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "loadtest.json": as_json,
        "loadtest.md": markdown(report).encode(),
        "loadtest.svg": plot(report["steps"]),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    about = (
        f"{report['questions']:,} questions, Zipf s = {report['skew']:g}; mean think time {report['think_s']:g} s; "
        f"{report['step_s']:g} s per step; {report['edits']} edits in total. "
        "On one machine, generator and servers share the cores."
    )
    lines = [
        "# Load test",
        "",
        about,
        "",
        table(report["steps"]),
        "",
        "![Latency and throughput by number of users](loadtest.svg)",
        "",
    ]
    if report["stopped"]:
        lines += [f"Ended early: {report['stopped']}.", ""]
    return "\n".join(lines)


def table(steps: Sequence[Mapping[str, Any]]) -> str:
    """The steps as a Markdown table."""
    rows = [[title for title, _ in _COLUMNS], ["---"] * len(_COLUMNS)]
    rows += [["" if step[name] is None else f"{step[name]:,}" for _, name in _COLUMNS] for step in steps]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(steps: Sequence[Mapping[str, Any]]) -> bytes:
    """Latency and throughput by number of users, as SVG."""
    chart = pygal.Line(
        title="Latency and throughput by number of users",
        x_title="users",
        y_title="milliseconds; right: answers per second",
        legend_at_bottom=True,
        js=[],  # no external scripts
    )
    chart.x_labels = [f"{step['users']:,}" for step in steps]
    for title, name in (("mean", "mean_ms"), ("p50", "p50_ms"), ("p95", "p95_ms"), ("p99", "p99_ms")):
        chart.add(title, [step[name] for step in steps])
    chart.add("answers/s", [step["answers_per_s"] for step in steps], secondary=True)
    rendered: bytes = chart.render()
    return rendered
