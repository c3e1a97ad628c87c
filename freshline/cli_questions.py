"""``ask``: putting questions."""

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

from freshline.terminal import Data, Json, add_command, out, print_json

if TYPE_CHECKING:  # heavy, and only there when a command has run
    from infra.settings import Settings

_SNIPPET_CHARS: Final = 200
"""About three lines of a terminal."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(app, ask)


def ask(
    *,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    top_k: Annotated[int, typer.Option(min=1, max=50, help="Passages to show.")] = 5,
    generate: Annotated[bool, typer.Option(help="Write an answer from the passages.")] = True,
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
      freshline ask "travel" --min-position documents.v1-3:42 --json
    """
    from freshline.installation import find  # noqa: PLC0415 - heavy

    parameters: dict[str, Any] = {"top_k": top_k, "generate": generate}
    if min_position is not None:
        parameters["min_position"] = min_position
    answer = asyncio.run(_ask(find(data), question, parameters))
    if as_json:
        print_json(answer)
    else:
        show_answer(answer, out)


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


async def _ask(settings: "Settings", question: str, parameters: dict[str, Any]) -> dict[str, Any]:
    from freshline.services import connect_services  # noqa: PLC0415 - heavy

    async with connect_services(settings) as services:
        return await services.ask(question, **parameters)
