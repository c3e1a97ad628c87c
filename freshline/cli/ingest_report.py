"""What ``ingest`` reports: what became of each event and each file, and the exit code that follows from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from freshline.cli.terminal import FAILED, INCOMPLETE, UNFINISHED, err, out
from ingest.connectors.client import SentEvent, Summary
from ingest.connectors.outcomes import EndedEvent, EventOutcomes, Findings, find

_SHOWN: Final = 20
"""Lines of one kind on a terminal; all of them are in the JSON."""


@dataclass(frozen=True)
class Report:
    """A run of ``ingest`` at its end.

    Attributes:
        summary: what was sent, and what was not.
        outcomes: how the events ended that were sent.
        wait_s: longest wait for outcomes, in seconds; None where they were not asked for.
        error: what kept the rest of the source from being sent.
    """

    summary: Summary
    outcomes: EventOutcomes
    wait_s: float | None
    error: Exception | None = None

    @cached_property
    def findings(self) -> Findings:
        """The outcomes, sorted out."""
        return find(self.outcomes.ended)

    @property
    def failed(self) -> int:
        """Documents that were refused, and events that could not be processed."""
        return len(self.summary.failed) + len(self.findings.failed)

    @property
    def under_way(self) -> Sequence[SentEvent]:
        """Events that were waited for in vain."""
        return self.outcomes.under_way

    @property
    def is_searchable(self) -> bool:
        """Whether all that this run had to send is known to be searchable; files that were passed over do not count."""
        found = self.findings
        unsure = self.wait_s is None or self.error is not None or self.under_way
        return not (unsure or self.failed or found.superseded or found.empty)

    def exit_code(self, *, allow_partial: bool = False) -> int:
        """See ``freshline ingest --help``."""
        if self.failed:
            return FAILED
        if self.under_way:
            return UNFINISHED
        left_out = self.findings.superseded or self.findings.empty or self.summary.passed_over
        return INCOMPLETE if left_out and not allow_partial else 0

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        found, summary = self.findings, self.summary
        refused = [{"document_id": one.document_id, "event_id": None, "reason": one.reason} for one in summary.failed]
        return {
            "sent": summary.sent,
            "unchanged": summary.skipped,
            "deleted": summary.deleted,
            "failed": self.failed,
            "searchable": self.is_searchable,
            "positions": summary.positions,
            "outcomes": _counted(self.outcomes.ended),
            "failures": [*refused, *map(_ended, found.failed)],
            "without_passages": [_ended(one) for one in found.empty],
            "superseded": [_ended(one) for one in found.superseded],
            "replaced": len(found.replaced),
            "passed_over": [{"path": path, "reason": reason} for path, reason in summary.passed_over.items()],
            "under_way": [
                {"document_id": one.document_id, "event_id": one.event_id, "position": str(one.position)}
                for one in self.under_way
            ],
        }

    def show_findings(self) -> None:
        """Name, on standard error, all that was not sent or is not searchable."""
        summary = self.summary
        show_lines([refused(one.document_id, one.reason) for one in summary.failed], style="red")
        show_ended(self.outcomes.ended)
        show_lines([passed_over(path, reason) for path, reason in summary.passed_over.items()])
        show_lines([f"under way: {one.document_id}: event {one.event_id} at {one.position}" for one in self.under_way])
        if self.findings.failed:
            told = "could not be processed: see `freshline dead-letters list`"
            err.print(f"{len(self.findings.failed)} {told}", style="red")
        if self.under_way:
            why = self.outcomes.problem or f"within {self.wait_s or 0:g} s"
            err.print(
                f"{len(self.under_way)} events are not known to have ended ({why}). They lose nothing by waiting: "
                "`freshline lag` shows whether workers are there, and `freshline dead-letters list` afterwards what "
                "could not be processed",
                style="red",
            )

    def show_counts(self) -> None:
        """The result, in a line."""
        out.print(f"{counts(self.summary, self.findings)}{self._conclusion()}")

    def _conclusion(self) -> str:
        if not self.summary.sent and not self.summary.deleted:
            return ""
        if self.wait_s is None:
            return "; how they end was not waited for (--wait)"
        if self.error is not None:
            return "; the rest was not sent"
        if self.is_searchable:
            return "; all that was sent is searchable"
        return f"; {len(self.under_way)} under way" if self.under_way else "; not all that was sent is searchable"


def counts(summary: Summary, found: Findings | None = None) -> str:
    """What was done, in numbers."""
    failed = len(summary.failed) + (len(found.failed) if found else 0)
    parts = [f"{summary.sent} sent, {summary.skipped} unchanged, {summary.deleted} deleted, {failed} failed"]
    if found:
        parts += [f"{len(found.empty)} without passages"] if found.empty else []
        parts += [f"{len(found.superseded)} superseded"] if found.superseded else []
        parts += [f"{len(found.replaced)} replaced by later versions"] if found.replaced else []
    parts += [f"{len(summary.passed_over)} passed over"] if summary.passed_over else []
    return ", ".join(parts)


def show_ended(ended: Sequence[EndedEvent]) -> None:
    """Name the events whose content cannot be found, with the reason."""
    found = find(ended)
    show_lines([_failed(one) for one in found.failed], style="red")
    show_lines([f"{one.event.document_id}: 0 passages: {one.reason or 'no text'}" for one in found.empty])
    show_lines([f"superseded: {one.event.document_id}: {one.reason}" for one in found.superseded])


def show_lines(lines: Sequence[str], *, style: str = "yellow") -> None:
    """As many of the lines as people read, and how many more there are."""
    for line in lines[:_SHOWN]:
        err.print(line, style=style)
    if len(lines) > _SHOWN:
        err.print(f"… and {len(lines) - _SHOWN} more like these: --json has all", style=style)


def refused(document_id: str, reason: str) -> str:
    """A document that was not sent."""
    return f"not sent: {document_id}: {reason}"


def passed_over(path: str, reason: str) -> str:
    """A file that is no document."""
    return f"passed over: {path}: {reason}"


def _failed(one: EndedEvent) -> str:
    what = "deletion" if one.event.deleted else "document"
    return f"not processed: {one.event.document_id}: {one.reason or f'the {what} is a dead letter'}"


def _ended(one: EndedEvent) -> dict[str, Any]:
    return {"document_id": one.event.document_id, "event_id": one.event.event_id, "reason": one.reason}


def _counted(ended: Sequence[EndedEvent]) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for one in ended:
        numbers[str(one.outcome)] = numbers.get(str(one.outcome), 0) + 1
    return numbers
