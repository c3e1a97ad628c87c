"""``freshline bench``: reproducible measurements."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from bench import cli_load
from bench.backlog import bench_backlog
from bench.cache import POLICIES, bench_cache
from bench.corpus import read_questions
from bench.entries import bench_entries
from bench.evaluation import bench_evaluation
from bench.freshness import bench_freshness
from bench.harness import Data, Events, Figures, Json, Model, measure, overrides, say
from bench.ingest import bench_ingest
from bench.plot import stale_rates
from bench.redis_states import bench_redis_states
from bench.retrieval import MODELS, bench_retrieval
from bench.traffic import SimulationTiming
from freshline.cli.terminal import add_command
from infra.local import Stack

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Benchmarks. docs/benchmarks describes each of them, with results.",
)

_Questions = Annotated[
    list[Path],
    typer.Option(exists=True, dir_okay=False, help="Questions, .jsonl or .jsonl.gz, lines with `text`; repeatable."),
]
_WAITING: Final = (100_000,)
_ENTRIES: Final = (10_000, 25_000, 50_000, 100_000)


def ingest(
    events: Events,
    model: Model = None,
    cold: Annotated[bool, typer.Option(help="Measure without warm-up.")] = False,  # noqa: FBT002 - an option
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Throughput of a complete history through the pipeline, relative to the embedder alone; verifies the result.

    Examples:
      freshline bench ingest --events history.jsonl.gz
      freshline bench ingest --events history.jsonl.gz --model all-minilm-l6-v2 --json
    """
    measure(
        lambda stack: bench_ingest(stack, events, overrides=overrides(model), cold=cold, say=say),
        data,
        as_json=as_json,
    )


def freshness(
    events: Events,
    edits: Annotated[int, typer.Option(min=1, help="Number of measured edits.")] = 40,
    model: Model = None,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Time from the 202 response of edits and deletes to the first answer that reflects them.

    Examples:
      freshline bench freshness --events history.jsonl.gz
      freshline bench freshness --events history.jsonl.gz --edits 10 --json
    """
    measure(
        lambda stack: bench_freshness(stack, events, edits=edits, overrides=overrides(model)), data, as_json=as_json
    )


def retrieval(
    collection: Annotated[
        Path,
        typer.Argument(
            exists=True, file_okay=False, help="Directory with corpus.jsonl[.gz], queries.jsonl and qrels.tsv."
        ),
    ],
    model: Annotated[list[str] | None, typer.Option(help="Model; repeatable.")] = None,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """nDCG@10 of both retrievers and their fusion on a collection with relevance judgements.

    Examples:
      freshline bench retrieval beir/scifact
      freshline bench retrieval beir/scifact --model bge-small-en-v1.5 --json
    """
    measure(lambda stack: bench_retrieval(stack, collection, models=model or MODELS), data, as_json=as_json)


def redis_states(
    seconds: Annotated[float, typer.Option(min=1, help="Seconds for each state.")] = 10.0,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Answers and edits while Redis is slow, hanging, out of memory, down, wiped or failed over; checks each answer.

    Examples:
      freshline bench redis-states
      freshline bench redis-states --seconds 30 --json
    """
    measure(lambda stack: bench_redis_states(stack, seconds=seconds, say=say), data, as_json=as_json)


def backlog(
    waiting: Annotated[
        list[int] | None, typer.Option(min=1, help="Number of events; repeatable, one round each.")
    ] = None,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Memory of the workers during a backlog of events.

    Examples:
      freshline bench backlog --waiting 100000
      freshline bench backlog --waiting 10000 --waiting 40000 --json
    """
    measure(lambda stack: bench_backlog(stack, waiting=waiting or _WAITING, say=say), data, as_json=as_json)


def cache(  # noqa: PLR0917 - options of a command
    events: Events,
    questions: Annotated[
        list[Path],
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Questions, .jsonl or .jsonl.gz, lines with `text`; repeatable.",
        ),
    ],
    policy: Annotated[list[str] | None, typer.Option(help=f"{', '.join(POLICIES)}; repeatable. Default: all.")] = None,
    edits: Annotated[int | None, typer.Option(min=1, help="Events after the snapshot; default: all.")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.1, help="Time limit of the replay in minutes; the figures contain the number of edits."),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Questions asked in total, Zipf-distributed.")] = 10_000,
    change_every: Annotated[float, typer.Option(min=0.01, help="Seconds between changes in simulated time.")] = 1.0,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Plot content-stale answers over the edits, as SVG.")
    ] = None,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Accuracy of invalidation policies after each edit of a history, compared with the ground truth.

    With --json, one line per policy. The policy `all` invalidates all answers. By default, every policy is measured.

    Examples:
      freshline bench cache --events history.jsonl.gz --questions commits.jsonl --questions headings.jsonl
      freshline bench cache --events history.jsonl.gz --questions questions.jsonl --policy exact --edits 100 --json
      freshline bench cache --events history.jsonl.gz --questions questions.jsonl --minutes 20 --plot stale.svg
    """
    if unknown := set(policy or ()).difference(POLICIES):
        raise typer.BadParameter(
            f"{', '.join(sorted(unknown))}: choose from {', '.join(POLICIES)}", param_hint="--policy"
        )

    async def run(stack: Stack) -> Sequence[Figures]:
        figures = await bench_cache(
            stack,
            events,
            questions,
            policies=policy or POLICIES,
            edits=edits,
            minutes=minutes,
            requests=requests,
            timing=SimulationTiming(change_every_s=change_every),
            say=say,
        )
        if plot is not None:
            plot.write_bytes(stale_rates(figures))
        return figures

    measure(run, data, as_json=as_json)


def entries(  # noqa: PLR0917 - options of a command
    events: Events,
    questions: _Questions,
    distinct: Annotated[int, typer.Option(min=1, help="Number of questions, the first of the files.")] = 300,
    edits: Annotated[int, typer.Option(min=1, help="EditSender that drop an answer, to be timed.")] = 40,
    near_caches: Annotated[int, typer.Option(min=1, help="Number of near caches.")] = 4,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Time of cache hits and fills relative to a plain cache, and time to invalidate the last near-cache entry.

    Examples:
      freshline bench entries --events history.jsonl.gz --questions headings.jsonl
      freshline bench entries --events history.jsonl.gz --questions commits.jsonl --edits 100 --near-caches 8 --json
    """

    async def run(stack: Stack) -> Figures:
        asked = read_questions(questions)[:distinct]
        return await bench_entries(stack, events, asked, edits=edits, near_caches=near_caches, say=say)

    measure(run, data, as_json=as_json)


def evaluation(  # noqa: PLR0917 - options of a command
    events: Events,
    questions: _Questions,
    entries: Annotated[
        list[int] | None, typer.Option(min=1, help="Cached answers; repeatable. Default: 10000 to 100000.")
    ] = None,
    changes: Annotated[int, typer.Option(min=1, help="Number of changes, the first that add a passage.")] = 24,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Time of exact invalidation to evaluate a change, by the number of cached answers.

    With --json, one line for each number. Matrix products use all available cores; OPENBLAS_NUM_THREADS=1 measures one.

    Examples:
      OPENBLAS_NUM_THREADS=1 freshline bench evaluation --events history.jsonl.gz --questions questions.jsonl --json
      freshline bench evaluation --events history.jsonl.gz --questions questions.jsonl --entries 20000 --changes 10
    """
    measure(
        lambda stack: bench_evaluation(stack, events, questions, entries=entries or _ENTRIES, changes=changes, say=say),
        data,
        as_json=as_json,
    )


for _command in (ingest, freshness, retrieval, cache, evaluation, entries, redis_states, backlog, *cli_load.COMMANDS):
    add_command(app, _command)
