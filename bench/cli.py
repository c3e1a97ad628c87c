"""``freshline bench``: measurements that anyone can repeat."""

from pathlib import Path
from typing import Annotated, Final

import typer

from bench import cli_load
from bench.backlog import bench_backlog
from bench.cache import POLICIES, bench_cache
from bench.corpus import read_questions
from bench.entries import bench_entries
from bench.freshness import bench_freshness
from bench.ingest import bench_ingest
from bench.judge import bench_judge
from bench.measuring import Data, Events, Figures, Json, Model, measure, overrides, say
from bench.plot import stale_shares
from bench.redis_states import bench_redis_states
from bench.retrieval import MODELS, bench_retrieval
from bench.traffic import Pace
from freshline.cli.terminal import add_command
from infra.local import Stack

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure Freshline on this machine; each figure in docs/benchmarks.md names its command.",
)

_Questions = Annotated[
    list[Path],
    typer.Option(
        exists=True, dir_okay=False, help="Questions, .jsonl or .jsonl.gz; each line has a text. Repeat for several."
    ),
]
_WAITING: Final = (100_000,)
_ENTRIES: Final = (10_000, 25_000, 50_000, 100_000)


def ingest(
    events: Events,
    model: Model = None,
    cold: Annotated[bool, typer.Option(help="Do not warm the servers up before.")] = False,  # noqa: FBT002 - an option
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Run a whole history through the pipeline, beside its embedder alone, and verify the end.

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
    edits: Annotated[int, typer.Option(min=1, help="Single edits to time.")] = 40,
    model: Model = None,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Time single edits and deletes, from the 202 to the first answer that has them.

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
            exists=True, file_okay=False, help="Directory with corpus.jsonl[.gz], queries.jsonl, qrels.tsv."
        ),
    ],
    model: Annotated[list[str] | None, typer.Option(help="Model to measure; repeat for several.")] = None,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Measure nDCG@10 of the lexical leg, the vector leg and both on a judged collection.

    Examples:
      freshline bench retrieval beir/scifact
      freshline bench retrieval beir/scifact --model bge-small-en-v1.5 --json
    """
    measure(lambda stack: bench_retrieval(stack, collection, models=model or MODELS), data, as_json=as_json)


def redis_states(
    seconds: Annotated[float, typer.Option(min=1, help="Length of each state.")] = 10.0,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Ask and edit while Redis is slow, hanging, full, down, wiped, failed over; judge each answer.

    Examples:
      freshline bench redis-states
      freshline bench redis-states --seconds 30 --json
    """
    measure(lambda stack: bench_redis_states(stack, seconds=seconds, say=say), data, as_json=as_json)


def backlog(
    waiting: Annotated[
        list[int] | None, typer.Option(min=1, help="Events to send at once; repeat for several rounds.")
    ] = None,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Send far more events than can be processed at once, and watch the memory of each worker until all are done.

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
            help="Questions, .jsonl or .jsonl.gz; each line has a text. Repeat for several.",
        ),
    ],
    policy: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(POLICIES)}; repeat for several. By default every one.")
    ] = None,
    edits: Annotated[int | None, typer.Option(min=1, help="Events after the snapshot; by default all.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Stop the replay after so long, and say how far it came.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Questions asked in all, under Zipf's skew.")] = 10_000,
    change_every: Annotated[
        float, typer.Option(min=0.01, help="Seconds between two changes on the clock of what is asked.")
    ] = 1.0,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Draw the content-stale share over the edits, as SVG.")
    ] = None,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Compare cached answers with the truth after each edit of a history, for each policy of invalidation.

    With --json, one line for each policy. --policy all is the policy that drops all answers; every policy is measured
    where none is named.

    Examples:
      freshline bench cache --events history.jsonl.gz --questions commits.jsonl --questions headings.jsonl
      freshline bench cache --events history.jsonl.gz --questions questions.jsonl --policy exact --edits 100 --json
      freshline bench cache --events history.jsonl.gz --questions questions.jsonl --minutes 20 --plot stale.svg
    """
    if unknown := set(policy or ()).difference(POLICIES):
        raise typer.BadParameter(
            f"{', '.join(sorted(unknown))}: choose of {', '.join(POLICIES)}", param_hint="--policy"
        )

    async def run(stack: Stack) -> list[Figures]:
        figures = await bench_cache(
            stack,
            events,
            questions,
            policies=policy or POLICIES,
            edits=edits,
            minutes=minutes,
            requests=requests,
            pace=Pace(change_every_s=change_every),
            say=say,
        )
        if plot is not None:
            plot.write_bytes(stale_shares(figures))
        return figures

    measure(run, data, as_json=as_json)


def entries(  # noqa: PLR0917 - options of a command
    events: Events,
    questions: _Questions,
    distinct: Annotated[int, typer.Option(min=1, help="Questions that are asked, the first of the files.")] = 300,
    edits: Annotated[int, typer.Option(min=1, help="Edits that drop an answer, to be timed.")] = 40,
    listeners: Annotated[int, typer.Option(min=1, help="Near caches that hear of drops.")] = 4,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Time hits and fills beside those of a plain cache, and how soon the last near cache has heard of a drop.

    Examples:
      freshline bench entries --events history.jsonl.gz --questions headings.jsonl
      freshline bench entries --events history.jsonl.gz --questions commits.jsonl --edits 100 --listeners 8 --json
    """

    async def run(stack: Stack) -> Figures:
        asked = read_questions(questions)[:distinct]
        return await bench_entries(stack, events, asked, edits=edits, listeners=listeners, say=say)

    measure(run, data, as_json=as_json)


def judge(  # noqa: PLR0917 - options of a command
    events: Events,
    questions: _Questions,
    entries: Annotated[
        list[int] | None, typer.Option(min=1, help="Cached answers; repeat for several. By default 10000 to 100000.")
    ] = None,
    changes: Annotated[int, typer.Option(min=1, help="Changes to judge, the first that add a passage.")] = 24,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Time how long exact invalidation takes to judge a change, by the number of cached answers.

    With --json, one line for each number. The product of vectors takes as many cores as it is given;
    OPENBLAS_NUM_THREADS=1 measures one.

    Examples:
      OPENBLAS_NUM_THREADS=1 freshline bench judge --events history.jsonl.gz --questions questions.jsonl --json
      freshline bench judge --events history.jsonl.gz --questions questions.jsonl --entries 20000 --changes 10
    """
    measure(
        lambda stack: bench_judge(stack, events, questions, entries=entries or _ENTRIES, changes=changes, say=say),
        data,
        as_json=as_json,
    )


for _command in (ingest, freshness, retrieval, cache, judge, entries, redis_states, backlog, *cli_load.COMMANDS):
    add_command(app, _command)
