"""``freshline bench``: measurements that anyone can repeat."""

import asyncio
import os
import platform
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console

from freshline.bench.cache import POLICIES, bench_cache
from freshline.bench.freshness import bench_freshness
from freshline.bench.ingest import bench_ingest
from freshline.bench.installation import BenchmarkFailed
from freshline.bench.redis_states import bench_redis_states
from freshline.bench.retrieval import MODELS, bench_retrieval
from freshline.services import ServiceFailed
from freshline.terminal import add_command
from infra.local import Phase, Stack, StackConfig, StackError
from ingest.connectors.event_file import BadEventFile

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure Freshline on this machine; each figure in docs/benchmarks.md names its command.",
)
_err = Console(stderr=True)

_Events = Annotated[
    Path, typer.Option("--events", exists=True, dir_okay=False, help="Recorded history, .jsonl or .jsonl.gz.")
]
_Model = Annotated[str | None, typer.Option(help=f"Embedding model instead of the default: {', '.join(MODELS)}.")]
_Json = Annotated[bool, typer.Option("--json", help="One line of JSON, last on standard output.")]
_Figures = dict[str, Any]
_Data = Annotated[Path | None, typer.Option(help="Data directory of the local stack.")]


def ingest(
    events: _Events,
    model: _Model = None,
    cold: Annotated[bool, typer.Option(help="Do not warm the servers up before.")] = False,  # noqa: FBT002 - an option
    data: _Data = None,
    as_json: _Json = False,  # noqa: FBT002 - an option
) -> None:
    """Run a whole history through the pipeline, beside its embedder alone, and verify the end.

    Examples:
      freshline bench ingest --events history.jsonl.gz
      freshline bench ingest --events history.jsonl.gz --model all-minilm-l6-v2 --json
    """
    _measure(
        lambda stack: bench_ingest(stack, events, overrides=_overrides(model), cold=cold, say=_say),
        data,
        as_json=as_json,
    )


def freshness(
    events: _Events,
    edits: Annotated[int, typer.Option(min=1, help="Single edits to time.")] = 40,
    model: _Model = None,
    data: _Data = None,
    as_json: _Json = False,  # noqa: FBT002 - an option
) -> None:
    """Time single edits and deletes, from the 202 to the first answer that has them.

    Examples:
      freshline bench freshness --events history.jsonl.gz
      freshline bench freshness --events history.jsonl.gz --edits 10 --json
    """
    _measure(
        lambda stack: bench_freshness(stack, events, edits=edits, overrides=_overrides(model)), data, as_json=as_json
    )


def retrieval(
    collection: Annotated[
        Path,
        typer.Argument(
            exists=True, file_okay=False, help="Directory with corpus.jsonl[.gz], queries.jsonl, qrels.tsv."
        ),
    ],
    model: Annotated[list[str] | None, typer.Option(help="Model to measure; repeat for several.")] = None,
    data: _Data = None,
    as_json: _Json = False,  # noqa: FBT002 - an option
) -> None:
    """Measure nDCG@10 of the lexical leg, the vector leg and both on a judged collection.

    Examples:
      freshline bench retrieval beir/scifact
      freshline bench retrieval beir/scifact --model bge-small-en-v1.5 --json
    """
    _measure(lambda stack: bench_retrieval(stack, collection, models=model or MODELS), data, as_json=as_json)


def redis_states(
    seconds: Annotated[float, typer.Option(min=1, help="Length of each state.")] = 10.0,
    data: _Data = None,
    as_json: _Json = False,  # noqa: FBT002 - an option
) -> None:
    """Ask and edit while Redis is slow, hanging, full, down, wiped, failed over; judge each answer.

    Examples:
      freshline bench redis-states
      freshline bench redis-states --seconds 30 --json
    """
    _measure(lambda stack: bench_redis_states(stack, seconds=seconds, say=_say), data, as_json=as_json)


def cache(  # noqa: PLR0917 - options of a command
    events: _Events,
    questions: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="Questions, .jsonl or .jsonl.gz; each line has a text.")
    ],
    policy: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(POLICIES)}; repeat for several. By default every one.")
    ] = None,
    edits: Annotated[int | None, typer.Option(min=1, help="Events after the snapshot; by default all.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Questions asked in all, under Zipf's skew.")] = 10_000,
    data: _Data = None,
    as_json: _Json = False,  # noqa: FBT002 - an option
) -> None:
    """Compare cached answers with the truth after each edit of a history, for each policy of invalidation.

    With --json, one line for each policy.

    Examples:
      freshline bench cache --events history.jsonl.gz --questions questions.jsonl
      freshline bench cache --events history.jsonl.gz --questions questions.jsonl --policy exact --edits 100 --json
    """
    if unknown := set(policy or ()).difference(POLICIES):
        raise typer.BadParameter(
            f"{', '.join(sorted(unknown))}: choose of {', '.join(POLICIES)}", param_hint="--policy"
        )
    _measure(
        lambda stack: bench_cache(
            stack, events, questions, policies=policy or POLICIES, edits=edits, requests=requests, say=_say
        ),
        data,
        as_json=as_json,
    )


def _overrides(model: str | None) -> dict[str, str]:
    return {} if model is None else {"FRESHLINE_EMBEDDING__MODEL": model}


def _measure(run: Callable[[Stack], Awaitable[_Figures | list[_Figures]]], data: Path | None, *, as_json: bool) -> None:
    try:
        with _running(data) as stack:
            figures = asyncio.run(_awaited(run(stack)))
    except (BadEventFile, BenchmarkFailed, ServiceFailed, StackError) as error:
        _err.print(f"error: {error}", markup=False, highlight=False)
        raise typer.Exit(1) from None
    option = 0 if as_json else orjson.OPT_INDENT_2
    for one in figures if isinstance(figures, list) else [figures]:
        sys.stdout.write(orjson.dumps(_machine() | one, option=option).decode() + "\n")


async def _awaited(run: Awaitable[_Figures | list[_Figures]]) -> _Figures | list[_Figures]:
    return await run


@contextmanager
def _running(data: Path | None) -> Iterator[Stack]:
    """The local stack; one that is not running is started, and stopped again."""
    stack = Stack.open(StackConfig() if data is None else StackConfig(data_dir=data))
    started = stack.status().state is not Phase.READY
    if started:
        stack.up(detach=True, say=_say)
    try:
        yield stack
    finally:
        if started:
            stack.down()


def _say(what: str, state: str) -> None:
    _err.print(f"{what}: {state}", markup=False, highlight=False)


def _machine() -> dict[str, Any]:
    """What shares the cores: everything does, the load and all servers."""
    return {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}


for _command in (ingest, freshness, retrieval, cache, redis_states):
    add_command(app, _command)
