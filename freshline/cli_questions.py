"""``ask``: putting questions."""

import asyncio
import time
from typing import Annotated, Any

import typer

from freshline.terminal import out, print_json

Json = Annotated[bool, typer.Option("--json", help="One line of JSON, last on standard output.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(ask)


def ask(
    *,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    top_k: Annotated[int, typer.Option(min=1, max=50, help="Passages to show.")] = 5,
    generate: Annotated[bool, typer.Option(help="Write an answer from the passages.")] = True,
    min_position: Annotated[str | None, typer.Option(help="Answer from a state that has this position.")] = None,
    as_json: Json = False,
) -> None:
    r"""Ask a question; prints the answer, its sources, and what it is true for.

    \b
    Examples:
      freshline ask "How do I ask for leave?"
      freshline ask "travel" --no-generate --top-k 10
      freshline ask "travel" --min-position documents.v1-3:42 --json
    """
    answer = asyncio.run(_ask(question, top_k, generate=generate, min_position=min_position))
    if as_json:
        print_json(answer)
    else:
        show_answer(answer)


def show_answer(answer: dict[str, Any]) -> None:
    """Print an answer for a person."""
    if answer.get("answer"):
        out.print(answer["answer"], style="bold", markup=False)
        out.print()
    for number, result in enumerate(answer["results"], start=1):
        place = " > ".join([result["title"] or result["document_id"], *result["heading_path"]])
        out.print(f"[{number}] {place}", style="cyan", markup=False)
        out.print(
            f"    {result['document_id']}, version {result['version']}, score {result['score']:.4f}",
            style="dim",
            markup=False,
        )
        text = " ".join(result["text"].split())
        out.print(f"    {text[:200]}{'…' if len(text) > 200 else ''}", markup=False)  # noqa: PLR2004 - about three lines
    if not answer["results"]:
        out.print("Nothing is known about that.")
    as_of = answer["as_of"]
    reflected = sum(offset + 1 for offset in as_of["positions"].values())
    how = "cached" if answer["cached"] else "not cached"
    age_ms = max(0.0, time.time() * 1000 - as_of["checked_ms"])
    out.print(
        f"{answer['query_time_ms']:.1f} ms, {how}; true for the stream up to {reflected} events on "
        f"{len(as_of['positions'])} partitions, checked {age_ms:.0f} ms ago",
        style="dim",
        markup=False,
    )


async def _ask(question: str, top_k: int, *, generate: bool, min_position: str | None) -> dict[str, Any]:
    from freshline.installation import find  # noqa: PLC0415 - heavy
    from freshline.services import connect_services  # noqa: PLC0415 - as above

    parameters: dict[str, Any] = {"top_k": top_k, "generate": generate}
    if min_position is not None:
        parameters["min_position"] = min_position
    async with connect_services(find()) as services:
        return await services.ask(question, **parameters)
