"""Structured logging to standard error, including log lines of libraries."""

import logging
import os
import sys
from typing import Final

import structlog
from structlog.types import Processor

from infra.environment import unknown_variables
from infra.settings import Settings

_log = structlog.get_logger(__name__)

_VERBOSE_LIBRARIES: Final = ("aiokafka", "opensearch", "botocore", "urllib3", "httpx", "httpcore", "uvicorn", "asyncio")
"""Libraries that log each request or heartbeat. Only their warnings are logged."""


def configure_logging(settings: Settings) -> None:
    """Configure structlog and the standard library's logging for this process. Replaces an earlier configuration.

    JSON lines have ``timestamp`` (UTC, ISO 8601), ``level``, ``logger``, ``event``, and the fields of the context and
    the caller. Tracebacks do not contain local variables, which may contain documents or keys.
    """
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_rendering(settings)],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    for name in _VERBOSE_LIBRARIES:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    for variable, similar in unknown_variables(os.environ).items():
        _log.warning("unknown_setting", variable=variable, similar=similar)


def _rendering(settings: Settings) -> list[Processor]:
    if settings.log_format == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
