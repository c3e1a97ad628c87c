"""The ``freshline`` command. Commands import what they need when they run, so that ``--help`` is quick."""

import sys

import typer

from chaos import cli as cli_chaos
from freshline.cli import dead_letters as cli_letters
from freshline.cli import documents as cli_documents
from freshline.cli import dry_run as cli_dry_run
from freshline.cli import keys as cli_keys
from freshline.cli import loadtest as cli_load
from freshline.cli import questions as cli_questions
from freshline.cli import stack as cli_stack
from freshline.cli import workers as cli_workers
from freshline.cli.terminal import FAILED, INTERRUPTED, add_command, debugging, explain, fail

app = typer.Typer(
    name="freshline",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
    help="Answers over documents that never stop changing: never older than the stream.",
)
for group in (
    cli_stack,
    cli_documents,
    cli_dry_run,
    cli_questions,
    cli_keys,
    cli_workers,
    cli_letters,
    cli_load,
    cli_chaos,
):
    group.register(app)


@app.callback()
def begin() -> None:
    """Keep what libraries log off the screen: what matters of it comes as an exception. Processes set up their own."""
    import logging  # noqa: PLC0415 - heavy

    import structlog  # noqa: PLC0415 - as above

    level = logging.DEBUG if debugging() else logging.CRITICAL
    logging.basicConfig(level=level)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def bench(context: typer.Context) -> None:
    """Measure Freshline on this machine: ingest, freshness, retrieval, cache, users and more.

    Examples:
      freshline bench --help
      freshline bench freshness --events history.jsonl.gz
    """
    from bench.cli import app as bench_app  # noqa: PLC0415 - heavy

    bench_app(context.args, prog_name="freshline bench")


add_command(
    app, bench, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)


def main() -> None:
    """Run a command. What is wrong is said in one line; FRESHLINE_LOG_LEVEL=debug shows where it happened."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        if debugging():
            raise
        fail(explain(error))
        sys.exit(FAILED)
