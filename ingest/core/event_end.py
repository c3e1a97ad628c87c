"""How an event ended, where nobody could record it: what its document's manifest tells of it."""

from schemas.documents import EventStatus, Outcome, Stage
from schemas.index import Manifest
from schemas.topics import DEAD_LETTERS


def with_derived_end(status: EventStatus, manifest: Manifest | None) -> EventStatus:
    """``status`` with its outcome, as far as it follows from the manifest.

    Args:
        status: of an event that has certainly ended, at a known position, without its outcome.
        manifest: of the event's document, read after that; None where there is none.
    """
    if manifest is None:  # the document's first event was given up, or a manifest was lost
        return status
    outcome, reason = _end(status, manifest)
    stage = Stage.PURGED if outcome is Outcome.DONE else status.stage
    return status.model_copy(update={"outcome": outcome, "reason": reason, "stage": stage})


def _end(status: EventStatus, manifest: Manifest) -> tuple[Outcome | None, str | None]:
    if Stage.SEARCHABLE in status.stages_ms:
        return Outcome.DONE, None
    if manifest.version < status.version:  # it never came as far as the index
        return Outcome.DEAD_LETTER, f"its end was not recorded; {DEAD_LETTERS.name} has it, with the reason"
    if (manifest.version, manifest.position) != (status.version, status.position):
        return Outcome.SUPERSEDED, f"its end was not recorded; version {manifest.version} stands by now"
    if manifest.failure is not None:
        return Outcome.DEAD_LETTER, manifest.failure
    return (Outcome.DONE if manifest.complete else None), None
