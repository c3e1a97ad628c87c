"""The ``freshline`` command. Commands import their dependencies when they run, which keeps ``--help`` fast."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Final

import typer

from freshline.cli import dead_letters, documents, dry_run, keys, loadtest, questions, stack, workers
from freshline.cli.terminal import FAILED, INTERRUPTED, add_command, debugging, explain, fail

_CHECKOUT: Final = Path(__file__).parents[2]
"""Root of the checkout, with `bench` and `chaos`. A wheel includes neither."""

app = typer.Typer(
    name="freshline",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
    help="Streaming RAG backend: index document changes within a second, answer from them, invalidate stale answers.",
)
for group in (stack, documents, dry_run, questions, keys, workers, dead_letters, loadtest):
    group.register(app)


@app.callback()
def begin() -> None:
    """Silence library logs: relevant failures are raised as exceptions. Long-running processes configure their own."""
    import logging  # noqa: PLC0415 - heavy

    import structlog  # noqa: PLC0415 - as above

    level = logging.DEBUG if debugging() else logging.CRITICAL
    logging.basicConfig(level=level)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _from_checkout(package: str) -> ModuleType:
    """Import the command module of a package that exists in a checkout only."""
    if str(_CHECKOUT) not in sys.path:
        sys.path.append(str(_CHECKOUT))
    return importlib.import_module(f"{package}.cli")


def bench(context: typer.Context) -> None:
    """Measure Freshline on this machine: ingest, freshness, retrieval, cache, users and more.

    Examples:
      freshline bench --help
      freshline bench freshness --events history.jsonl.gz
    """
    _from_checkout("bench").app(context.args, prog_name="freshline bench")


if (_CHECKOUT / "pyproject.toml").is_file():
    add_command(
        app, bench, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
    )
    _from_checkout("chaos").register(app)


def main() -> None:
    """Run a command. Errors are printed in one line; FRESHLINE_LOG_LEVEL=debug prints a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        if debugging():
            raise
        fail(explain(error))
        sys.exit(FAILED)
