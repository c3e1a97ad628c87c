"""``ask``: putting questions; ``explain-cache``: what is cached for them."""

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

from freshline.cli.terminal import Data, Json, add_command, out, print_json

if TYPE_CHECKING:  # heavy, and only there when a command has run
    from infra.settings import Settings

Question = Annotated[str, typer.Argument(help="What to ask.")]
TopK = Annotated[int, typer.Option(min=1, max=50, help="Passages to show.")]
Generate = Annotated[bool, typer.Option(help="Write an answer from the passages.")]
Filters = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        metavar="NAME=VALUE",
        help="Only passages with this attribute, such as `metadata.year=2024`; may be given again, and a name that is "
        "given again means any of its values.",
    ),
]

_SNIPPET_CHARS: Final = 200
"""About three lines of a terminal."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(app, ask)
    add_command(app, explain_cache)


def ask(
    *,
    question: Question,
    top_k: TopK = 5,
    generate: Generate = True,
    filters: Filters = None,
    min_position: Annotated[
        str | None, typer.Option(help="Answer from a state that has this position; waits for it, within bounds.")
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Ask a question; prints the answer, its sources, and what it is true for.

    Examples:
      freshline ask "How do I ask for leave?"
      freshline ask "travel" --no-generate --top-k 10
      freshline ask "travel" --filter metadata.team=legal --filter metadata.team=people
      freshline ask "travel" --min-position documents.v1-3:42 --json
    """
    from freshline.installation import find  # noqa: PLC0415 - heavy

    parameters = _parameters(top_k, filters, generate=generate)
    if min_position is not None:
        parameters["min_position"] = min_position
    answer = asyncio.run(_ask(find(data), question, parameters))
    if as_json:
        print_json(answer)
    else:
        show_answer(answer, out)


def explain_cache(
    *,
    question: Question,
    top_k: TopK = 5,
    generate: Generate = True,
    filters: Filters = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Tell what is cached for a question, what it stands on, and why it was last dropped; asks nothing.

    The options are those of `ask`: with others it is another answer. With several query processes, whether
    a process has a copy is told of the one that answers.

    Examples:
      freshline explain-cache "How do I ask for leave?"
      freshline explain-cache "travel" --no-generate --top-k 10 --json
    """
    from freshline.installation import find  # noqa: PLC0415 - heavy

    parameters = _parameters(top_k, filters, generate=generate)
    explained = asyncio.run(_explained(find(data), question, parameters))
    if as_json:
        print_json(explained)
    else:
        show_explanation(explained, out)


def show_answer(answer: dict[str, Any], console: Console) -> None:
    """Print an answer for a person."""
    if answer.get("answer"):
        console.print(answer["answer"], style="bold")
        console.print()
    for number, result in enumerate(answer["results"], start=1):
        # A title is often the first heading too.
        place = " > ".join(dict.fromkeys([result["title"] or result["document_id"], *result["heading_path"]]))
        console.print(f"[{number}] {place}", style="cyan")
        console.print(
            f"    {result['document_id']}, version {result['version']}, score {result['score']:.4f}", style="dim"
        )
        text = " ".join(result["text"].split())
        console.print(f"    {text[:_SNIPPET_CHARS]}{'…' if len(text) > _SNIPPET_CHARS else ''}")
    if not answer["results"]:
        console.print("Nothing is known about that.")
    as_of = answer["as_of"]
    reflected = sum(offset + 1 for offset in as_of["positions"].values())
    how = "cached" if answer["cached"] else "not cached"
    age_ms = max(0.0, time.time() * 1000 - as_of["checked_ms"])
    at = time.strftime("%H:%M:%S", time.localtime(as_of["checked_ms"] / 1000))
    console.print(
        f"{answer['query_time_ms']:.1f} ms, {how}; true as of {at} ({age_ms:.0f} ms ago), with the first {reflected} "
        f"events of the stream on {len(as_of['positions'])} partitions",
        style="dim",
    )


def show_explanation(told: dict[str, Any], console: Console) -> None:
    """Print what is known of a cached answer for a person."""
    stored = told["stored"]
    console.print(f"key {told['key']}, slice {told['slice']} of tenant {told['tenant']}", style="dim")
    if told["left_aside"]:
        console.print("Cached answers of this tenant are left aside: invalidation is behind.", style="yellow")
    if stored is None:
        console.print("Not cached.", style="bold")
    else:
        copy = "with" if told["near"] else "without"
        console.print(
            f"Cached at {_at(stored['filled_ms'])}, for {stored['ends_in_ms'] / 1000:.0f} s more, "
            f"{stored['size_bytes']} bytes, {copy} a copy in the process that was asked.",
            style="bold",
        )
        for number, source in enumerate(stored["sources"], start=1):
            console.print(f"[{number}] {source['document_id']}, version {source['version']}", style="cyan")
        for leg in ("vector", "lexical"):
            window = stored[f"{leg}_window"]
            score = window["fused_edge_score"]
            edge = f", the last of them with score {score:.4f}" if score is not None else ""
            console.print(
                f"{leg} window: {window['places']} of {window['asked']} places, {window['fused']} fused{edge}",
                style="dim",
            )
    console.print(f"Answers of this slice are true as of {_at(told['as_of']['checked_ms'])}.", style="dim")
    for drop in told["drops"]:
        what = "all answers of the slice" if drop["everything"] else "this answer"
        why = drop["unjudged"] or ", ".join(drop["documents"]) or "no reason was given"
        console.print(f"Dropped at {_at(drop['at_ms'])}: {what}: {why}")
        for event in drop["events"]:
            console.print(f"    event {event['event_id']}: {_event(event)}", style="dim")
    if not told["drops"]:
        console.print("No drop of it is remembered.")


def _event(event: dict[str, Any]) -> str:
    if event["document_id"] is None:
        return "no longer known"
    searchable_ms = event["searchable_ms"]
    since = f", searchable at {_at(searchable_ms)}" if searchable_ms is not None else ""
    return f"{event['document_id']}, version {event['version']}, {event['position']}{since}"


def _at(epoch_ms: float) -> str:
    whole_s, ms = divmod(int(epoch_ms), 1_000)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(whole_s))}.{ms:03d}"


def _parameters(top_k: int, filters: list[str] | None, *, generate: bool) -> dict[str, Any]:
    parameters: dict[str, Any] = {"top_k": top_k, "generate": generate}
    wanted: dict[str, list[str]] = {}
    for text in filters or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"{text!r}: write NAME=VALUE, such as metadata.year=2024", param_hint="--filter")
        wanted.setdefault(name, []).append(value)
    if wanted:
        parameters["filters"] = wanted
    return parameters


async def _explained(settings: "Settings", question: str, parameters: dict[str, Any]) -> dict[str, Any]:
    from freshline.services import connect_services  # noqa: PLC0415 - heavy

    async with connect_services(settings) as services:
        return await services.explained(question, **parameters)


async def _ask(settings: "Settings", question: str, parameters: dict[str, Any]) -> dict[str, Any]:
    from freshline.services import connect_services  # noqa: PLC0415 - heavy

    async with connect_services(settings) as services:
        return await services.ask(question, **parameters)
