"""Every metric is declared once, exported by one kind of process, and documented."""

import re
from pathlib import Path

import pytest

from freshline.metrics_reference import declared_metrics
from schemas import telemetry
from schemas.telemetry import MetricSpec

ROOT = Path(__file__).parents[2]
PRODUCT = ("freshline", "ingest", "query", "streams", "infra")
SOURCES = {
    file: file.read_text(encoding="utf-8") for package in PRODUCT for file in sorted((ROOT / package).rglob("*.py"))
}
DECLARED = {name: spec for name, spec in vars(telemetry).items() if isinstance(spec, MetricSpec)}
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "benchmarks").glob("*.md")]


def registrations(constant: str) -> list[Path]:
    """Modules that register the metric."""
    call = re.compile(rf"\b(counter|gauge|histogram)\((telemetry\.)?{constant},")
    return [file for file, text in SOURCES.items() if call.search(text)]


@pytest.mark.parametrize("constant", DECLARED)
def test_a_declared_metric_is_registered_in_one_module(constant):
    assert len(registrations(constant)) == 1


def test_metrics_are_registered_from_their_declarations_only():
    raw = re.compile(r"\b(Counter|Gauge|Histogram|Summary)\(\s*[\"']freshline_")
    assert [file for file, text in SOURCES.items() if raw.search(text)] == []


@pytest.mark.parametrize("spec", DECLARED.values(), ids=lambda spec: spec.name)
def test_names_follow_the_conventions_of_prometheus(spec):
    assert spec.name.startswith("freshline_")
    assert spec.name.endswith("_total") == (spec.kind == "counter")
    assert bool(spec.buckets) == (spec.kind == "histogram")
    assert spec.help.endswith(".")


def test_names_are_unique():
    names = [spec.name for spec in declared_metrics()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_metrics_exist(page):
    suffixes = ("", "_bucket", "_count", "_sum")
    names = {spec.name + suffix for spec in declared_metrics() for suffix in suffixes}
    documented = set(re.findall(r"`(freshline_[a-z_]+)(?:\{[^`]*\})?`", page.read_text(encoding="utf-8")))
    assert documented - names - {"freshline_groups", "freshline_revision", "freshline_take_over"} == set()
