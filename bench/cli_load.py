"""``freshline bench users|…``: the query tier under load, and what it finds."""

from typing import Annotated

import typer

from bench.hits import bench_hits
from bench.loaded import Ground
from bench.measuring import Data, Events, Json, Model, Questions, measure, overrides, say
from bench.misses import IN_FLIGHT, bench_misses
from bench.overload import bench_overload
from bench.recall import WIDTHS, bench_recall
from bench.users import bench_users

Processes = Annotated[int, typer.Option(min=1, help="Query processes behind one address.")]
Warm = Annotated[float, typer.Option(min=0, help="Seconds of other questions before, for servers to warm up.")]
Keep = Annotated[
    str | None,
    typer.Option(
        help="Leave the documents on the stack under this name, and use those that an earlier run left; by default "
        "they are loaded anew and removed.",
    ),
]


def users(  # noqa: PLR0917 - options of a command
    events: Events,
    questions: Questions,
    users: Annotated[list[int] | None, typer.Option(min=1, help="Users at a time; repeat for several.")] = None,
    think_s: Annotated[float, typer.Option(min=0.1, help="Mean seconds between an answer and the next question.")] = 10,
    minutes: Annotated[float, typer.Option(min=0.05, help="Minutes for each number of users.")] = 10,
    ramp_s: Annotated[float, typer.Option(min=0, help="Seconds over which the users come, with an empty cache.")] = 60,
    warm_s: Warm = 60,
    skew: Annotated[float, typer.Option(min=0, help="Zipf's s over the questions; 0 makes all equally frequent.")] = 1,
    edits_per_s: Annotated[float, typer.Option(min=0, help="Edits of the history in a second.")] = 1,
    processes: Processes = 1,
    keep: Keep = None,
    model: Model = None,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Let thousands of users ask, each with pauses to think, while the documents are edited.

    An answer counts as served past the objective if it lacks a change that has been searchable for more than a
    second when it arrives. With --json, one line for each number of users.

    Examples:
      freshline bench users --events history.jsonl.gz --questions questions.jsonl.gz --users 5000
      freshline bench users --events history.jsonl.gz --questions questions.txt --users 100 --minutes 1 --keep manual
    """
    measure(
        lambda stack: bench_users(
            Ground(stack, events, say, overrides(model), keep, processes),
            questions,
            users=users or [5_000],
            think_s=think_s,
            minutes=minutes,
            ramp_s=ramp_s,
            warm_s=warm_s,
            skew=skew,
            edits_per_s=edits_per_s,
        ),
        data,
        as_json=as_json,
    )


def misses(  # noqa: PLR0917 - options of a command
    events: Events,
    questions: Questions,
    in_flight: Annotated[list[int] | None, typer.Option(min=1, help="Questions at a time; repeat for several.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Seconds for each number of questions.")] = 20,
    warm_s: Warm = 30,
    processes: Processes = 1,
    keep: Keep = None,
    model: Model = None,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Ask what nobody has asked before, beside the index alone and a usual search service in the same run.

    Examples:
      freshline bench misses --events history.jsonl.gz --questions questions.jsonl.gz
      freshline bench misses --events history.jsonl.gz --questions questions.txt --in-flight 1 --in-flight 64 --json
    """
    measure(
        lambda stack: bench_misses(
            Ground(stack, events, say, overrides(model), keep, processes),
            questions,
            in_flight=in_flight or IN_FLIGHT,
            seconds=seconds,
            warm_s=warm_s,
        ),
        data,
        as_json=as_json,
    )


def hits(  # noqa: PLR0917 - options of a command
    events: Events,
    questions: Questions,
    distinct: Annotated[int, typer.Option(min=1, help="Different questions, drawn under Zipf's skew.")] = 100,
    connections: Annotated[int, typer.Option(min=1, help="Connections at a time.")] = 5_000,
    seconds: Annotated[float, typer.Option(min=1, help="Seconds for each of the three.")] = 60,
    processes: Processes = 1,
    keep: Keep = None,
    model: Model = None,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Ask what is cached as fast as wrk can, beside a bare ASGI application with the same bytes, and the usual cache.

    The usual one is FastAPI with models, one GET of Redis and a time to live.

    Examples:
      freshline bench hits --events history.jsonl.gz --questions questions.jsonl.gz
      freshline bench hits --events history.jsonl.gz --questions questions.txt --connections 200 --seconds 10 --json
    """
    measure(
        lambda stack: bench_hits(
            Ground(stack, events, say, overrides(model), keep, processes),
            questions,
            distinct=distinct,
            connections=connections,
            seconds=seconds,
        ),
        data,
        as_json=as_json,
    )


def overload(  # noqa: PLR0917 - options of a command
    events: Events,
    questions: Questions,
    times: Annotated[float, typer.Option(min=1, help="How many times its capacity the service is asked.")] = 3,
    seconds: Annotated[float, typer.Option(min=4, help="Seconds of overload.")] = 60,
    warm_s: Warm = 30,
    processes: Processes = 1,
    keep: Keep = None,
    model: Model = None,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Ask several times what can be answered of questions that nobody has asked before, and see what is left after.

    Examples:
      freshline bench overload --events history.jsonl.gz --questions questions.jsonl.gz
      freshline bench overload --events history.jsonl.gz --questions questions.txt --times 5 --seconds 20 --json
    """
    measure(
        lambda stack: bench_overload(
            Ground(stack, events, say, overrides(model), keep, processes),
            questions,
            times=times,
            seconds=seconds,
            warm_s=warm_s,
        ),
        data,
        as_json=as_json,
    )


def recall(  # noqa: PLR0917 - options of a command
    events: Events,
    questions: Questions,
    ef_search: Annotated[
        list[int] | None, typer.Option(min=1, max=10_000, help="Candidates of the walk; repeat for several.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Questions that are drawn.")] = 150,
    keep: Keep = None,
    model: Model = None,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Compare what the vector leg finds with an exact search, by the width of its walk through the graph.

    With --json, one line for each width.

    Examples:
      freshline bench recall --events history.jsonl.gz --questions questions.jsonl.gz
      freshline bench recall --events history.jsonl.gz --questions questions.txt --ef-search 400 --keep manual --json
    """
    measure(
        lambda stack: bench_recall(
            Ground(stack, events, say, overrides(model), keep),
            questions,
            widths=ef_search or WIDTHS,
            sample=sample,
        ),
        data,
        as_json=as_json,
    )


COMMANDS = (users, misses, hits, overload, recall)
