"""``freshline bench users|…``: the query tier under load."""

from typing import Annotated

import typer

from freshline.bench.measuring import Data, Events, Json, Model, Questions, measure, overrides, say
from freshline.bench.users import bench_users

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
    skew: Annotated[float, typer.Option(min=0, help="Zipf's s over the questions; 0 makes all equally frequent.")] = 1,
    edits_per_s: Annotated[float, typer.Option(min=0, help="Edits of the history in a second.")] = 1,
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
            stack,
            events,
            questions,
            users=users or [5_000],
            think_s=think_s,
            minutes=minutes,
            skew=skew,
            edits_per_s=edits_per_s,
            keep=keep,
            overrides=overrides(model),
            say=say,
        ),
        data,
        as_json=as_json,
    )


COMMANDS = (users,)
