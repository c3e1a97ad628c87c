"""``dry-run``: which cached answers an edit would change."""

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from freshline.cli.terminal import MISUSED, Data, Json, add_command, fail, out, print_json

if TYPE_CHECKING:
    from streams.dry_run import DryRunResult, Touched

_WHY: Final = {
    "cites": "cites a passage that goes or is stored anew",
    "comes_in": "a new passage comes in",
    "unclear": "may change: too little of it is known, so it would be retrieved again",
    "unjudged": "is dropped unjudged: the edit changes more at once than is judged",
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(app, dry_run)


def dry_run(
    *,
    file: Annotated[Path | None, typer.Argument(exists=True, dir_okay=False, help="The edited document.")] = None,
    document_id: Annotated[
        str | None, typer.Option("--id", help="Id of the document; by default the path as it is given.")
    ] = None,
    delete: Annotated[str | None, typer.Option(help="Instead of a file: a document to delete.")] = None,
    title: Annotated[str | None, typer.Option(help="Title, as it would be sent.")] = None,
    group: Annotated[list[str] | None, typer.Option(help="Group that may see it; repeat for several.")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Tell which cached answers an edit would change, before it is sent. Nothing is written or dropped.

    Attributes that are not given are none, as in an upload without them. The answers are those of this moment.

    Examples:
      freshline dry-run guides/travel.md
      freshline dry-run draft.md --id guides/travel.md --group hr --json
      freshline dry-run --delete guides/travel.md
    """
    if (file is None) == (delete is None):
        raise fail("name a file, or --delete DOCUMENT", MISUSED)
    from freshline.dry_run import dry_run as rehearse  # noqa: PLC0415 - heavy
    from freshline.installation import find  # noqa: PLC0415 - as above
    from infra.embedding.port import EmbeddingError  # noqa: PLC0415 - as above
    from infra.opensearch.port import IndexUnavailable  # noqa: PLC0415 - as above
    from infra.redis.port import CacheUnavailable  # noqa: PLC0415 - as above
    from ingest.core.content import UnsupportedType  # noqa: PLC0415 - as above
    from streams.dry_run import NotNow, Unprocessable  # noqa: PLC0415 - as above

    name = delete if file is None else document_id or file.as_posix()
    try:
        found = asyncio.run(
            rehearse(
                find(data),
                name or "",
                None if file is None else file.read_bytes(),
                file_name=None if file is None else file.name,
                title=title,
                groups=group or (),
            )
        )
    except (UnsupportedType, Unprocessable) as error:
        raise fail(f"it would be refused: {error}") from None
    except NotNow as error:
        raise fail(str(error)) from None
    except (IndexUnavailable, CacheUnavailable, EmbeddingError) as error:
        raise fail(f"{error}: is the stack up? see `freshline status`") from None
    if as_json:
        print_json({"document_id": name, **asdict(found)})
    else:
        _show(name or "", found)


def _show(name: str, found: "DryRunResult") -> None:
    out.print(
        f"{name}: {found.added} passages would be written, {found.removed} taken away, {found.kept} kept; "
        f"{len(found.touched)} of {found.answers} cached answers would change.",
        style="bold",
    )
    for one in found.touched:
        readers = f" (groups {', '.join(one.groups)})" if one.groups else ""
        out.print(f"  {one.question}{readers}", style="cyan")
        out.print(f"    {_WHY[one.why]}{_places(one)}" + (f": {one.passage}" if one.passage else ""), style="dim")


def _places(one: "Touched") -> str:
    legs = {"vector": one.vector_rank, "lexical": one.lexical_rank}
    told = [f"place {rank} of the {leg} leg" for leg, rank in legs.items() if rank is not None]
    return f" ({', '.join(told)})" if told else ""
