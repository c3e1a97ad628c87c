"""Benchmarks of the query tier: ``freshline bench users``, ``misses``, ``hits``, ``overload`` and ``recall``."""

from typing import Annotated

import typer

from bench.harness import Data, Events, Json, Model, Questions, measure, overrides, say
from bench.hits import bench_hits
from bench.misses import IN_FLIGHT, bench_misses
from bench.overload import bench_overload
from bench.preloaded import BenchmarkSetup
from bench.recall import CANDIDATE_COUNTS, bench_recall
from bench.users import bench_users

Processes = Annotated[int, typer.Option(min=1, help="Query processes behind one address.")]
Warm = Annotated[float, typer.Option(min=0, help="Seconds of warm-up with other questions.")]
Keep = Annotated[
    str | None,
    typer.Option(
        help="Keep the documents on the stack under this name, and reuse those of an earlier run. By default they "
        "are loaded for this run and removed.",
    ),
]


def users(  # noqa: PLR0917 - options of a command
    events: Events,
    questions: Questions,
    users: Annotated[list[int] | None, typer.Option(min=1, help="Concurrent users; repeatable.")] = None,
    think_s: Annotated[float, typer.Option(min=0.1, help="Mean seconds between an answer and the next question.")] = 10,
    minutes: Annotated[float, typer.Option(min=0.05, help="Minutes for each number of users.")] = 10,
    ramp_s: Annotated[float, typer.Option(min=0, help="Seconds over which users start, with an empty cache.")] = 60,
    warm_s: Warm = 60,
    skew: Annotated[float, typer.Option(min=0, help="Zipf's s over the questions; 0 for uniform.")] = 1,
    edits_per_s: Annotated[float, typer.Option(min=0, help="EditSender of the history in a second.")] = 1,
    processes: Processes = 1,
    keep: Keep = None,
    model: Model = None,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Load with thousands of users with think time, while documents are edited.

    A response violates the SLO if it lacks a change that has been searchable for more than a second. With --json, one
    line for each number of users.

    Examples:
      freshline bench users --events history.jsonl.gz --questions questions.jsonl.gz --users 5000
      freshline bench users --events history.jsonl.gz --questions questions.txt --users 100 --minutes 1 --keep manual
    """
    measure(
        lambda stack: bench_users(
            BenchmarkSetup(stack, events, say, overrides(model), keep, processes),
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
    in_flight: Annotated[list[int] | None, typer.Option(min=1, help="Concurrent questions; repeatable.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Seconds for each number of questions.")] = 20,
    warm_s: Warm = 30,
    processes: Processes = 1,
    keep: Keep = None,
    model: Model = None,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Throughput and latency of cache misses, compared with the index alone and a usual search service.

    Examples:
      freshline bench misses --events history.jsonl.gz --questions questions.jsonl.gz
      freshline bench misses --events history.jsonl.gz --questions questions.txt --in-flight 1 --in-flight 64 --json
    """
    measure(
        lambda stack: bench_misses(
            BenchmarkSetup(stack, events, say, overrides(model), keep, processes),
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
    distinct: Annotated[int, typer.Option(min=1, help="Distinct questions, Zipf-distributed.")] = 100,
    connections: Annotated[int, typer.Option(min=1, help="Concurrent connections.")] = 5_000,
    seconds: Annotated[float, typer.Option(min=1, help="Seconds for each of the three servers.")] = 60,
    processes: Processes = 1,
    keep: Keep = None,
    model: Model = None,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Throughput and latency of cache hits with wrk, compared with a bare ASGI application and a usual cache.

    The usual cache is FastAPI with models, one Redis GET and a TTL.

    Examples:
      freshline bench hits --events history.jsonl.gz --questions questions.jsonl.gz
      freshline bench hits --events history.jsonl.gz --questions questions.txt --connections 200 --seconds 10 --json
    """
    measure(
        lambda stack: bench_hits(
            BenchmarkSetup(stack, events, say, overrides(model), keep, processes),
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
    times: Annotated[float, typer.Option(min=1, help="Offered load as a multiple of the capacity.")] = 3,
    seconds: Annotated[float, typer.Option(min=4, help="Seconds of overload.")] = 60,
    warm_s: Warm = 30,
    processes: Processes = 1,
    keep: Keep = None,
    model: Model = None,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Offer a multiple of the capacity for cache misses; measure goodput, latency and recovery.

    Examples:
      freshline bench overload --events history.jsonl.gz --questions questions.jsonl.gz
      freshline bench overload --events history.jsonl.gz --questions questions.txt --times 5 --seconds 20 --json
    """
    measure(
        lambda stack: bench_overload(
            BenchmarkSetup(stack, events, say, overrides(model), keep, processes),
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
        list[int] | None, typer.Option(min=1, max=10_000, help="Candidates of the graph search; repeatable.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Number of sampled questions.")] = 150,
    keep: Keep = None,
    model: Model = None,
    data: Data = None,
    as_json: Json = False,  # noqa: FBT002 - an option
) -> None:
    """Recall and latency of the vector retriever by number of candidates, compared with an exact search.

    With --json, one line for each number.

    Examples:
      freshline bench recall --events history.jsonl.gz --questions questions.jsonl.gz
      freshline bench recall --events history.jsonl.gz --questions questions.txt --ef-search 400 --keep manual --json
    """
    measure(
        lambda stack: bench_recall(
            BenchmarkSetup(stack, events, say, overrides(model), keep),
            questions,
            candidate_counts=ef_search or CANDIDATE_COUNTS,
            sample=sample,
        ),
        data,
        as_json=as_json,
    )


COMMANDS = (users, misses, hits, overload, recall)
