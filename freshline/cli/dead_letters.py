"""``dead-letters``: list, inspect, replay and drop records that could not be processed."""

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freshline.cli.terminal import MISUSED, UNFINISHED, Data, Json, add_command, fail, out, print_json

if TYPE_CHECKING:  # heavy
    from infra.kafka.dead_letters import DeadLetterRecord
    from infra.settings import Settings
    from ingest.dead_letters import DeadLetterQueue

Ids = Annotated[
    list[str] | None, typer.Argument(metavar="ID", help="Ids of dead letters: `freshline dead-letters list`.")
]
All = Annotated[bool, typer.Option("--all", help="All open dead letters; with --kind, all of that kind.")]
Kind = Annotated[str | None, typer.Option("--kind", help="Only dead letters of this kind.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(
        name="dead-letters",
        no_args_is_help=True,
        rich_markup_mode=None,
        help="Dead-letter queue: records that a step could not process.\n\n\b\nExamples:\n"
        "  freshline dead-letters list\n  freshline dead-letters replay --all --kind failed",
    )
    add_command(group, list_dead_letters, name="list")
    add_command(group, show)
    add_command(group, replay)
    add_command(group, drop)
    app.add_typer(group)


def list_dead_letters(
    *,
    kind: Kind = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number to list. The counts include all.")] = 100,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """List the open dead letters, with counts by kind and by step.

    Examples:
      freshline dead-letters list
      freshline dead-letters list --kind failed --json
    """
    from freshline.installation import find  # noqa: PLC0415 - heavy
    from ingest.dead_letters import listed  # noqa: PLC0415 - as above

    listing = listed(asyncio.run(_open(find(data), kind)), limit)
    if as_json:
        print_json(listing.model_dump(mode="json"))
        return
    for dead_letter in listing.dead_letters:
        at = datetime.fromtimestamp(dead_letter.dead_lettered_ms / 1000, UTC).isoformat(timespec="seconds")
        document = (
            f"{dead_letter.document_id} version {dead_letter.version}"
            if dead_letter.document_id
            else "unknown document"
        )
        failure = f"{dead_letter.step}  {dead_letter.kind}: {document}: {dead_letter.reason}"
        out.print(f"{dead_letter.dead_letter_id}  {at}  {failure}")
    kinds = ", ".join(f"{name} {count}" for name, count in sorted(listing.by_kind.items()))
    more = f", {len(listing.dead_letters)} shown" if listing.total > len(listing.dead_letters) else ""
    out.print(f"{listing.total} open{more}" + (f": {kinds}" if kinds else ""))


def show(
    *,
    dead_letter_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the dead letter.")],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Show a dead letter: failure reason, headers and content.

    Examples:
      freshline dead-letters show documents.v1-3:42
      freshline dead-letters show documents.v1-3:42 --json
    """
    from freshline.installation import find  # noqa: PLC0415 - heavy
    from ingest.dead_letters import shown  # noqa: PLC0415 - as above

    [dead_letter] = asyncio.run(_read_chosen(find(data), [dead_letter_id]))
    content = shown(dead_letter)
    if as_json:
        print_json(content.model_dump(mode="json"))
        return
    out.print(f"{dead_letter.dead_letter_id}: {dead_letter.kind} in {dead_letter.step}: {dead_letter.reason}")
    for name, value in content.headers.items():
        out.print(f"  {name}: {value}", style="dim")
    out.print(content.value + (" …" if content.cut else ""))


def replay(
    *,
    ids: Ids = None,
    every: All = False,
    kind: Kind = None,
    wait: Annotated[
        bool | None, typer.Option(help="Wait for the outcome of every new event. Default: on a terminal.")
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0, help="Timeout of --wait in seconds.")] = 600,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Republish dead letters, after their cause is fixed, and close them.

    Each becomes a new event of the same version; if the document has a newer version, the event is superseded. The
    command is idempotent and can be interrupted. A record that is not a document event is sent unchanged, and has no
    outcome.

    Exit codes with --wait: 1, an event could not be processed, and is a dead letter again. 3, an event was still in
    progress at the timeout.

    Examples:
      freshline dead-letters replay documents.v1-3:42
      freshline dead-letters replay --all --kind failed --wait
    """
    from freshline.installation import find  # noqa: PLC0415 - heavy

    _check_choice(ids, every=every, kind=kind)
    wait_s = timeout_s if (sys.stderr.isatty() if wait is None else wait) else None
    sent = asyncio.run(_replay(find(data), ids, kind, wait_s))
    outcomes = Counter(row["outcome"] for row in sent if row["event_id"]) if wait_s is not None else Counter()
    if as_json:
        print_json({"replayed": sent})
    else:
        for row in sent:
            out.print(f"{row['dead_letter_id']}: {_replayed(row)}")
        counts = ", ".join(f"{count} {outcome or 'in progress'}" for outcome, count in outcomes.items())
        out.print(
            f"{len(sent)} replayed"
            + (f": {counts}" if counts else "; `freshline dead-letters list` shows new failures")
        )
    if outcomes["dead_letter"]:
        raise fail(f"{outcomes['dead_letter']} failed again: see `freshline dead-letters list`")
    if outcomes[None]:
        raise fail(
            f"{outcomes[None]} still in progress after {timeout_s:g} s: check for active workers with `freshline lag`",
            UNFINISHED,
        )


def drop(*, ids: Ids = None, every: All = False, kind: Kind = None, data: Data = None, as_json: Json = False) -> None:
    """Close dead letters without replaying them. Their documents stay unchanged.

    Examples:
      freshline dead-letters drop documents.v1-3:42
      freshline dead-letters drop --all --kind unsupported
    """
    from freshline.installation import find  # noqa: PLC0415 - heavy

    _check_choice(ids, every=every, kind=kind)
    dropped = asyncio.run(_drop(find(data), ids, kind))
    if as_json:
        print_json({"dropped": dropped})
    else:
        out.print(f"{len(dropped)} dropped")


def _check_choice(ids: Sequence[str] | None, *, every: bool, kind: str | None) -> None:
    if bool(ids) == every or (kind and not every):
        raise fail("give ids of dead letters, or --all, optionally with --kind", MISUSED)


async def _open(settings: "Settings", kind: str | None) -> "list[DeadLetterRecord]":
    async with _opened_queue(settings) as dead_letters:
        return await dead_letters.open(kind=kind)


async def _read_chosen(settings: "Settings", ids: Sequence[str]) -> "list[DeadLetterRecord]":
    async with _opened_queue(settings) as dead_letters:
        return await _chosen(dead_letters, ids, None)


def _replayed(row: dict[str, Any]) -> str:
    sent = f"event {row['event_id']} at {row['position']}" if row["event_id"] else "sent unchanged"
    reason = f": {row['reason']}" if row.get("reason") else ""
    return sent + (f", {row['outcome']}{reason}" if row.get("outcome") else "")


async def _replay(
    settings: "Settings", ids: Sequence[str] | None, kind: str | None, wait_s: float | None
) -> list[dict[str, Any]]:
    async with _opened_queue(settings) as dead_letters:
        chosen = await _chosen(dead_letters, ids, kind)
        # Sequentially, so that the events of a document keep their order.
        sent = [(dead_letter, await dead_letters.replay(dead_letter)) for dead_letter in chosen]
    rows = [replayed.model_dump(mode="json") for _, replayed in sent]
    if wait_s is None:
        return rows
    from freshline.cli.replayed import outcomes_of  # noqa: PLC0415 - heavy

    ended = await outcomes_of(settings, sent, timeout_s=wait_s)
    for row in rows:
        end = ended.get(row["event_id"])
        row["outcome"], row["reason"] = (str(end.outcome), end.reason) if end else (None, None)
    return rows


async def _drop(settings: "Settings", ids: Sequence[str] | None, kind: str | None) -> list[str]:
    async with _opened_queue(settings) as dead_letters:
        chosen = await _chosen(dead_letters, ids, kind)
        for dead_letter in chosen:
            await dead_letters.drop(dead_letter)
        return [dead_letter.dead_letter_id for dead_letter in chosen]


async def _chosen(
    dead_letters: "DeadLetterQueue", ids: Sequence[str] | None, kind: str | None
) -> "list[DeadLetterRecord]":
    """The dead letters with these ids, or all of the kind. Fails if any id has no open dead letter."""
    by_id = {dead_letter.dead_letter_id: dead_letter for dead_letter in await dead_letters.open(kind=kind)}
    if ids is None:
        return list(by_id.values())
    if missing := [dead_letter_id for dead_letter_id in ids if dead_letter_id not in by_id]:
        raise fail(f"no open dead letter {', '.join(missing)}: see `freshline dead-letters list`")
    return [by_id[dead_letter_id] for dead_letter_id in dict.fromkeys(ids)]


@asynccontextmanager
async def _opened_queue(settings: "Settings") -> "AsyncIterator[DeadLetterQueue]":
    from infra.kafka.producer import KafkaProducer  # noqa: PLC0415 - heavy
    from infra.kafka.topic_reader import read_to_end  # noqa: PLC0415 - as above
    from infra.redis.connect import connect_redis  # noqa: PLC0415 - as above
    from infra.redis.event_states import RedisEventStates  # noqa: PLC0415 - as above
    from ingest.dead_letters import DeadLetterQueue  # noqa: PLC0415 - as above
    from ingest.event_log import EventLog  # noqa: PLC0415 - as above

    producer = await KafkaProducer.open(settings)
    redis = connect_redis(settings.redis)
    try:
        event_log = EventLog(producer, RedisEventStates(redis, settings.names))
        yield DeadLetterQueue(partial(read_to_end, settings), producer, event_log)
    finally:
        await redis.aclose()
        await producer.close()
