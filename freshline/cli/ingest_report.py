"""Report of an ``ingest`` run: the outcome of each event and file, and the exit code."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from freshline.cli.terminal import FAILED, INCOMPLETE, UNFINISHED, err, out
from ingest.connectors.client import SentEvent, Summary
from ingest.connectors.outcomes import EndedEvent, EventOutcomes, Findings, classify

_MAX_LINES: Final = 20
"""Lines of one kind on a terminal. The JSON has all."""


@dataclass(frozen=True)
class Report:
    """Result of an ``ingest`` run.

    Attributes:
        summary: documents sent, rejected and skipped.
        outcomes: outcomes of the sent events.
        wait_s: timeout of the wait for outcomes, in seconds; None without a wait.
        error: error that ended the run before the whole source was sent.
    """

    summary: Summary
    outcomes: EventOutcomes
    wait_s: float | None
    error: Exception | None = None

    @cached_property
    def findings(self) -> Findings:
        """The outcomes, classified."""
        return classify(self.outcomes.ended)

    @property
    def failed(self) -> int:
        """Number of rejected documents and of events that could not be processed."""
        return len(self.summary.failed) + len(self.findings.failed)

    @property
    def in_progress(self) -> Sequence[SentEvent]:
        """Events without an outcome at the timeout."""
        return self.outcomes.in_progress

    @property
    def is_searchable(self) -> bool:
        """Whether everything that this run sent is known to be searchable. Skipped files do not count."""
        findings = self.findings
        unknown = self.wait_s is None or self.error is not None or self.in_progress
        return not (unknown or self.failed or findings.superseded or findings.empty)

    def exit_code(self, *, allow_partial: bool = False) -> int:
        """Exit code, as documented in ``freshline ingest --help``."""
        if self.failed:
            return FAILED
        if self.in_progress:
            return UNFINISHED
        omitted = self.findings.superseded or self.findings.empty or self.summary.ignored_files
        return INCOMPLETE if omitted and not allow_partial else 0

    def as_json(self) -> dict[str, Any]:
        """The full report as JSON."""
        findings, summary = self.findings, self.summary
        rejected = [
            {"document_id": failure.document_id, "event_id": None, "reason": failure.reason}
            for failure in summary.failed
        ]
        return {
            "sent": summary.sent,
            "unchanged": summary.skipped,
            "deleted": summary.deleted,
            "failed": self.failed,
            "searchable": self.is_searchable,
            "positions": summary.positions,
            "outcomes": _counted(self.outcomes.ended),
            "failures": [*rejected, *map(_ended, findings.failed)],
            "without_passages": [_ended(end) for end in findings.empty],
            "superseded": [_ended(end) for end in findings.superseded],
            "replaced": len(findings.replaced),
            "ignored_files": [{"path": path, "reason": reason} for path, reason in summary.ignored_files.items()],
            "in_progress": [
                {"document_id": event.document_id, "event_id": event.event_id, "position": str(event.position)}
                for event in self.in_progress
            ],
        }

    def show_findings(self) -> None:
        """Print everything that was not sent or is not searchable, on standard error."""
        summary = self.summary
        show_lines([rejected(failure.document_id, failure.reason) for failure in summary.failed], style="red")
        show_ended(self.outcomes.ended)
        show_lines([skipped(path, reason) for path, reason in summary.ignored_files.items()])
        show_lines(
            [
                f"in progress: {event.document_id}: event {event.event_id} at {event.position}"
                for event in self.in_progress
            ]
        )
        if self.findings.failed:
            text = "could not be processed: see `freshline dead-letters list`"
            err.print(f"{len(self.findings.failed)} {text}", style="red")
        if self.in_progress:
            why = self.outcomes.problem or f"timeout of {self.wait_s or 0:g} s"
            err.print(
                f"{len(self.in_progress)} events have no known outcome yet ({why}). They are durable in the stream: "
                "check for active workers with `freshline lag`, and for failures with `freshline dead-letters list`",
                style="red",
            )

    def show_counts(self) -> None:
        """Print the result in one line."""
        out.print(f"{counts(self.summary, self.findings)}{self._conclusion()}")

    def _conclusion(self) -> str:
        if not self.summary.sent and not self.summary.deleted:
            return ""
        if self.wait_s is None:
            return "; did not wait for outcomes (--wait)"
        if self.error is not None:
            return "; the rest was not sent"
        if self.is_searchable:
            return "; everything sent is searchable"
        return f"; {len(self.in_progress)} in progress" if self.in_progress else "; not everything sent is searchable"


def counts(summary: Summary, findings: Findings | None = None) -> str:
    """The counts of a run as text."""
    failed = len(summary.failed) + (len(findings.failed) if findings else 0)
    parts = [f"{summary.sent} sent, {summary.skipped} unchanged, {summary.deleted} deleted, {failed} failed"]
    if findings:
        parts += [f"{len(findings.empty)} without passages"] if findings.empty else []
        parts += [f"{len(findings.superseded)} superseded"] if findings.superseded else []
        parts += [f"{len(findings.replaced)} replaced by later versions"] if findings.replaced else []
    parts += [f"{len(summary.ignored_files)} skipped"] if summary.ignored_files else []
    return ", ".join(parts)


def show_ended(ended: Sequence[EndedEvent]) -> None:
    """Print the events whose content is not searchable, with the reason."""
    findings = classify(ended)
    show_lines([_failed(end) for end in findings.failed], style="red")
    show_lines([f"{end.event.document_id}: 0 passages: {end.reason or 'no text'}" for end in findings.empty])
    show_lines([f"superseded: {end.event.document_id}: {end.reason}" for end in findings.superseded])


def show_lines(lines: Sequence[str], *, style: str = "yellow") -> None:
    """Print the first lines, and the number of the others."""
    for line in lines[:_MAX_LINES]:
        err.print(line, style=style)
    if len(lines) > _MAX_LINES:
        err.print(f"… and {len(lines) - _MAX_LINES} more; --json lists all", style=style)


def rejected(document_id: str, reason: str) -> str:
    """Line for a document that was not sent."""
    return f"not sent: {document_id}: {reason}"


def skipped(path: str, reason: str) -> str:
    """Line for a file that is not a document."""
    return f"skipped: {path}: {reason}"


def _failed(end: EndedEvent) -> str:
    subject = "deletion" if end.event.deleted else "document"
    return f"not processed: {end.event.document_id}: {end.reason or f'the {subject} is a dead letter'}"


def _ended(end: EndedEvent) -> dict[str, Any]:
    return {"document_id": end.event.document_id, "event_id": end.event.event_id, "reason": end.reason}


def _counted(ended: Sequence[EndedEvent]) -> dict[str, int]:
    return dict(Counter(str(end.outcome) for end in ended))
