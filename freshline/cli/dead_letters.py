"""``dead-letters``: what could not be processed, and what is done about it."""

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

if TYPE_CHECKING:  # heavy, and only there when a command has run
    from infra.kafka.dead_letters import DeadLetterRecord
    from infra.settings import Settings
    from ingest.dead_letters import DeadLetterQueue

Ids = Annotated[
    list[str] | None, typer.Argument(metavar="ID", help="Letters, as `freshline dead-letters list` names them.")
]
All = Annotated[bool, typer.Option("--all", help="Every open letter, or with --kind every one of that kind.")]
Kind = Annotated[str | None, typer.Option("--kind", help="Only letters of this kind.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    letters = typer.Typer(
        name="dead-letters",
        no_args_is_help=True,
        rich_markup_mode=None,
        help="Records that a step gave up on: list, show, replay, drop.\n\n\b\nExamples:\n"
        "  freshline dead-letters list\n  freshline dead-letters replay --all --kind failed",
    )
    add_command(letters, list_letters, name="list")
    add_command(letters, show)
    add_command(letters, replay)
    add_command(letters, drop)
    app.add_typer(letters)


def list_letters(
    *,
    kind: Kind = None,
    limit: Annotated[int, typer.Option(min=1, help="Most letters to list; all are counted.")] = 100,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """List the dead letters that nobody has dealt with, and count them by kind and by step.

    Examples:
      freshline dead-letters list
      freshline dead-letters list --kind failed --json
    """
    from freshline.installation import find  # noqa: PLC0415 - heavy
    from ingest.dead_letters import listed  # noqa: PLC0415 - as above

    found = listed(asyncio.run(_open(find(data), kind)), limit)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    for letter in found.letters:
        at = datetime.fromtimestamp(letter.parked_ms / 1000, UTC).isoformat(timespec="seconds")
        what = f"{letter.document_id} version {letter.version}" if letter.document_id else "no document known"
        out.print(f"{letter.letter_id}  {at}  {letter.step}  {letter.kind}: {what}: {letter.reason}")
    kinds = ", ".join(f"{name} {count}" for name, count in sorted(found.by_kind.items()))
    more = f", {len(found.letters)} shown" if found.total > len(found.letters) else ""
    out.print(f"{found.total} open{more}" + (f": {kinds}" if kinds else ""))


def show(
    *,
    letter_id: Annotated[str, typer.Argument(metavar="ID", help="DeadLetterRecord to show.")],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Show a dead letter: why it was given up, its headers and its content.

    Examples:
      freshline dead-letters show documents.v1-3:42
      freshline dead-letters show documents.v1-3:42 --json
    """
    from freshline.installation import find  # noqa: PLC0415 - heavy
    from ingest.dead_letters import shown  # noqa: PLC0415 - as above

    [letter] = asyncio.run(_chosen_letters(find(data), [letter_id]))
    content = shown(letter)
    if as_json:
        print_json(content.model_dump(mode="json"))
        return
    out.print(f"{letter.letter_id}: {letter.kind} in {letter.step}: {letter.reason}")
    for name, value in content.headers.items():
        out.print(f"  {name}: {value}", style="dim")
    out.print(content.value + (" …" if content.cut else ""))


def replay(
    *,
    ids: Ids = None,
    every: All = False,
    kind: Kind = None,
    wait: Annotated[
        bool | None, typer.Option(help="Wait for the end of every new event; by default on a terminal.")
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0, help="Longest such wait, in seconds.")] = 600,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Send dead letters once more, after their cause is mended, and close them.

    Each becomes a new event of the same version: a document that has a newer version by now stays as it is. Running it
    again, or being interrupted, is harmless. A record that is no document event goes as it was, and has no outcome of
    its own.

    Exit codes, where it waits: 1, an event could not be processed, and is a dead letter again. 3, an event had not
    ended when --timeout was over; it goes on.

    Examples:
      freshline dead-letters replay documents.v1-3:42
      freshline dead-letters replay --all --kind failed --wait
    """
    from freshline.installation import find  # noqa: PLC0415 - heavy

    _check_choice(ids, every=every, kind=kind)
    wait_s = timeout_s if (sys.stderr.isatty() if wait is None else wait) else None
    sent = asyncio.run(_replay(find(data), ids, kind, wait_s))
    outcomes = Counter(one["outcome"] for one in sent if one["event_id"]) if wait_s is not None else Counter()
    if as_json:
        print_json({"replayed": sent})
    else:
        for one in sent:
            out.print(f"{one['letter_id']}: {_replayed(one)}")
        how = ", ".join(f"{count} {outcome or 'under way'}" for outcome, count in outcomes.items())
        out.print(
            f"{len(sent)} sent again" + (f": {how}" if how else ": `freshline dead-letters list` shows if any fail")
        )
    if outcomes["dead_letter"]:
        raise fail(f"{outcomes['dead_letter']} could not be processed again: see `freshline dead-letters list`")
    if outcomes[None]:
        raise fail(
            f"{outcomes[None]} have not ended within {timeout_s:g} s: `freshline lag` shows whether workers are there",
            UNFINISHED,
        )


def drop(*, ids: Ids = None, every: All = False, kind: Kind = None, data: Data = None, as_json: Json = False) -> None:
    """Close dead letters without doing anything else: their documents stay as they are.

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
        raise fail("name letters, or say --all, with --kind for those of one kind", MISUSED)


async def _open(settings: "Settings", kind: str | None) -> "list[DeadLetterRecord]":
    async with _parked(settings) as letters:
        return await letters.open(kind=kind)


async def _chosen_letters(settings: "Settings", ids: Sequence[str]) -> "list[DeadLetterRecord]":
    async with _parked(settings) as letters:
        return await _chosen(letters, ids, None)


def _replayed(one: dict[str, Any]) -> str:
    where = f"event {one['event_id']} at {one['position']}" if one["event_id"] else "sent as it was"
    reason = f": {one['reason']}" if one.get("reason") else ""
    return where + (f", {one['outcome']}{reason}" if one.get("outcome") else "")


async def _replay(
    settings: "Settings", ids: Sequence[str] | None, kind: str | None, wait_s: float | None
) -> list[dict[str, Any]]:
    async with _parked(settings) as letters:
        chosen = await _chosen(letters, ids, kind)
        # One after the other: those of one document keep their order.
        sent = [(letter, await letters.replay(letter)) for letter in chosen]
    told = [done.model_dump(mode="json") for _, done in sent]
    if wait_s is None:
        return told
    from freshline.cli.replayed import outcomes_of  # noqa: PLC0415 - heavy

    ended = await outcomes_of(settings, sent, timeout_s=wait_s)
    for one in told:
        found = ended.get(one["event_id"])
        one["outcome"], one["reason"] = (str(found.outcome), found.reason) if found else (None, None)
    return told


async def _drop(settings: "Settings", ids: Sequence[str] | None, kind: str | None) -> list[str]:
    async with _parked(settings) as letters:
        chosen = await _chosen(letters, ids, kind)
        for letter in chosen:
            await letters.drop(letter)
        return [letter.letter_id for letter in chosen]


async def _chosen(letters: "DeadLetterQueue", ids: Sequence[str] | None, kind: str | None) -> "list[DeadLetterRecord]":
    """The letters that are named, all of them or none; else all of the kind."""
    there = {letter.letter_id: letter for letter in await letters.open(kind=kind)}
    if ids is None:
        return list(there.values())
    if missing := [name for name in ids if name not in there]:
        raise fail(f"there is no open dead letter {', '.join(missing)}: see `freshline dead-letters list`")
    return [there[name] for name in dict.fromkeys(ids)]


@asynccontextmanager
async def _parked(settings: "Settings") -> "AsyncIterator[DeadLetterQueue]":
    from infra.kafka.producer import KafkaProducer  # noqa: PLC0415 - heavy
    from infra.kafka.reading import read_to_end  # noqa: PLC0415 - as above
    from infra.redis.connect import connect_redis  # noqa: PLC0415 - as above
    from infra.redis.event_states import RedisEventStates  # noqa: PLC0415 - as above
    from ingest.dead_letters import DeadLetterQueue  # noqa: PLC0415 - as above
    from ingest.event_log import EventLog  # noqa: PLC0415 - as above

    producer = await KafkaProducer.open(settings)
    redis = connect_redis(settings.redis)
    try:
        placing = EventLog(producer, RedisEventStates(redis, settings.names))
        yield DeadLetterQueue(partial(read_to_end, settings), producer, placing)
    finally:
        await redis.aclose()
        await producer.close()
