"""``dry-run``: show which cached answers an edit would change."""

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from freshline.cli.terminal import MISUSED, Data, Json, add_command, fail, out, print_json

if TYPE_CHECKING:
    from streams.dry_run import AffectedAnswer, DryRunResult

_REASONS: Final = {
    "source_changed": "cites a passage that is removed or rewritten",
    "enters_results": "a new passage enters the results",
    "uncertain": "may change: the stored candidates do not decide it, so it is retrieved again",
    "not_evaluated": "is invalidated without evaluation: the edit exceeds the evaluation limit",
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(app, dry_run)


def dry_run(
    *,
    file: Annotated[Path | None, typer.Argument(exists=True, dir_okay=False, help="The edited document.")] = None,
    document_id: Annotated[
        str | None, typer.Option("--id", help="Id of the document. Default: the path as given.")
    ] = None,
    delete: Annotated[str | None, typer.Option(help="Id of a document to delete, instead of a file.")] = None,
    title: Annotated[str | None, typer.Option(help="Title to send.")] = None,
    group: Annotated[list[str] | None, typer.Option(help="Group that can read the document. Repeatable.")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Show which cached answers an edit would change. Writes and invalidates nothing.

    Omitted attributes are empty, as in an upload without them. Evaluates the answers that are cached now.

    Examples:
      freshline dry-run guides/travel.md
      freshline dry-run draft.md --id guides/travel.md --group hr --json
      freshline dry-run --delete guides/travel.md
    """
    if (file is None) == (delete is None):
        raise fail("give a file, or --delete DOCUMENT", MISUSED)
    from freshline.dry_run import dry_run as evaluate  # noqa: PLC0415 - heavy
    from freshline.installation import find  # noqa: PLC0415 - as above
    from infra.embedding.port import EmbeddingError  # noqa: PLC0415 - as above
    from infra.opensearch.port import IndexUnavailable  # noqa: PLC0415 - as above
    from infra.redis.port import CacheUnavailable  # noqa: PLC0415 - as above
    from ingest.core.content import UnsupportedType  # noqa: PLC0415 - as above
    from streams.dry_run import DryRunUnavailable, Unprocessable  # noqa: PLC0415 - as above

    name = delete if file is None else document_id or file.as_posix()
    try:
        result = asyncio.run(
            evaluate(
                find(data),
                name or "",
                None if file is None else file.read_bytes(),
                file_name=None if file is None else file.name,
                title=title,
                groups=group or (),
            )
        )
    except (UnsupportedType, Unprocessable) as error:
        raise fail(f"it would be rejected: {error}") from None
    except DryRunUnavailable as error:
        raise fail(str(error)) from None
    except (IndexUnavailable, CacheUnavailable, EmbeddingError) as error:
        raise fail(f"{error}: check `freshline status`") from None
    if as_json:
        print_json({"document_id": name, **asdict(result)})
    else:
        _show(name or "", result)


def _show(name: str, result: "DryRunResult") -> None:
    out.print(
        f"{name}: {result.added} passages would be written, {result.removed} removed, {result.kept} kept; "
        f"{len(result.affected)} of {result.answers} cached answers would change.",
        style="bold",
    )
    for answer in result.affected:
        groups = f" (groups {', '.join(answer.groups)})" if answer.groups else ""
        passage = f": {answer.passage}" if answer.passage else ""
        out.print(f"  {answer.question}{groups}", style="cyan")
        out.print(f"    {_REASONS[answer.reason]}{_ranks(answer)}{passage}", style="dim")


def _ranks(answer: "AffectedAnswer") -> str:
    ranks = {"vector": answer.vector_rank, "lexical": answer.lexical_rank}
    texts = [f"{retriever} rank {rank}" for retriever, rank in ranks.items() if rank is not None]
    return f" ({', '.join(texts)})" if texts else ""
