"""``ask`` and ``explain-cache``: query the service, and inspect its cached answers."""

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

from freshline.cli.terminal import Data, Json, add_command, out, print_json

if TYPE_CHECKING:  # heavy, and only there when a command has run
    from infra.settings import Settings

Question = Annotated[str, typer.Argument(help="The question.")]
TopK = Annotated[int, typer.Option(min=1, max=50, help="Number of passages to return.")]
Generate = Annotated[bool, typer.Option(help="Generate an answer from the passages.")]
Filters = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        metavar="NAME=VALUE",
        help="Only passages with this attribute, such as `metadata.year=2024`. Repeatable: different names must all "
        "match; of one name, any value.",
    ),
]

_SNIPPET_CHARS: Final = 200
"""About three lines of a terminal."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_command(app, ask)
    add_command(app, explain_cache)


def ask(
    *,
    question: Question,
    top_k: TopK = 5,
    generate: Generate = True,
    filters: Filters = None,
    min_position: Annotated[
        str | None,
        typer.Option(help="Freshness token: answer from a state that reflects this position. Waits for it, bounded."),
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Ask a question. Prints the answer, its sources, and the stream positions that it reflects.

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
    """Show the cached answer of a question, its sources, and its recent invalidations. Does not run the query.

    The options are those of `ask`, and part of the cache key. With several query processes, the near cache shown is
    that of the process that responds.

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
    """Print an answer as text."""
    if answer.get("answer"):
        console.print(answer["answer"], style="bold")
        console.print()
    for number, result in enumerate(answer["results"], start=1):
        # The title is often also the first heading.
        heading = " > ".join(dict.fromkeys([result["title"] or result["document_id"], *result["heading_path"]]))
        console.print(f"[{number}] {heading}", style="cyan")
        console.print(
            f"    {result['document_id']}, version {result['version']}, score {result['score']:.4f}", style="dim"
        )
        text = " ".join(result["text"].split())
        console.print(f"    {text[:_SNIPPET_CHARS]}{'…' if len(text) > _SNIPPET_CHARS else ''}")
    if not answer["results"]:
        console.print("No results.")
    as_of = answer["as_of"]
    reflected = sum(offset + 1 for offset in as_of["positions"].values())
    how = "cached" if answer["cached"] else "not cached"
    age_ms = max(0.0, time.time() * 1000 - as_of["checked_ms"])
    at = time.strftime("%H:%M:%S", time.localtime(as_of["checked_ms"] / 1000))
    console.print(
        f"{answer['query_time_ms']:.1f} ms, {how}; as of {at} ({age_ms:.0f} ms ago): reflects the first {reflected} "
        f"events of the stream on {len(as_of['positions'])} partitions",
        style="dim",
    )


def show_explanation(explanation: dict[str, Any], console: Console) -> None:
    """Print the explanation of a cached answer as text."""
    stored = explanation["stored"]
    console.print(
        f"key {explanation['key']}, slice {explanation['slice']} of tenant {explanation['tenant']}", style="dim"
    )
    if explanation["bypassed"]:
        console.print("Cached answers of this tenant are bypassed: invalidation lags.", style="yellow")
    if stored is None:
        console.print("Not cached.", style="bold")
    else:
        near = "is" if explanation["near"] else "is not"
        console.print(
            f"Cached at {_at(stored['filled_ms'])}, expires in {stored['ttl_ms'] / 1000:.0f} s, "
            f"{stored['size_bytes']} bytes; it {near} in the near cache of the process that responded.",
            style="bold",
        )
        for number, source in enumerate(stored["sources"], start=1):
            console.print(f"[{number}] {source['document_id']}, version {source['version']}", style="cyan")
        for retriever in ("vector", "lexical"):
            window = stored[f"{retriever}_window"]
            score = window["lowest_fused_score"]
            lowest = f", lowest fused score {score:.4f}" if score is not None else ""
            console.print(
                f"{retriever} candidates: {window['kept']} kept of {window['requested']} requested, "
                f"{window['fused']} fused{lowest}",
                style="dim",
            )
    console.print(f"Answers of this slice are current as of {_at(explanation['as_of']['checked_ms'])}.", style="dim")
    for drop in explanation["drops"]:
        scope = "all answers of the slice" if drop["everything"] else "this answer"
        reason = drop["not_evaluated"] or ", ".join(drop["documents"]) or "no reason recorded"
        console.print(f"Invalidated at {_at(drop['at_ms'])}: {scope}: {reason}")
        for event in drop["events"]:
            console.print(f"    event {event['event_id']}: {_event(event)}", style="dim")
    if not explanation["drops"]:
        console.print("No recent invalidations.")


def _event(event: dict[str, Any]) -> str:
    if event["document_id"] is None:
        return "status expired"
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
