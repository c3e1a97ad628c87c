"""Generates JSON Schemas, OpenAPI, AsyncAPI, and the references of settings, commands and metrics. CI checks them.

``python -m freshline.contracts`` writes the files. With ``--check`` it exits with 1 if a file is outdated. The result
depends on the code alone, not on environment, clock or servers.
"""

import sys
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Final, Literal, TypeGuard, cast, get_args, get_origin

import orjson
from annotated_types import Ge, Gt, Le
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from freshline.cli_reference import cli_reference
from freshline.metrics_reference import metrics_reference
from infra.blobs.memory import MemoryBlobStore
from infra.kafka.memory import MemoryStreams
from infra.redis.memory_answers import MemoryAnswerCache
from infra.redis.memory_states import MemoryEventStates, MemoryVersions
from infra.settings import Section, Settings
from infra.web.credentials import Credentials
from infra.webhooks.memory import MemoryWebhooks
from ingest.accept import Stores
from ingest.api import build_api
from ingest.dead_letters import DeadLetterQueue
from ingest.event_log import EventLog
from query.api.app import ApiPolicy, ApiServices, ApiTelemetry, build_app
from query.operations.endpoints import Operations
from query.telemetry.rolling_stats import RollingStats
from schemas.batches import BatchResponse
from schemas.dead_letters import (
    DEAD_LETTER_HEADERS,
    DeadLetter,
    DeadLetterContent,
    DeadLetterResolved,
    DeadLetters,
    Replayed,
)
from schemas.documents import (
    Accepted,
    BatchItem,
    DeletionReceipt,
    DocumentState,
    DocumentText,
    EventsRequest,
    EventsResponse,
    EventStatus,
)
from schemas.events import EVENT_TYPES, ChunkPlan, DocumentEvent, EventEnded, IndexChange, StreamMessage
from schemas.index import Manifest, StoredChunk
from schemas.problems import Problem
from schemas.queries import QueryRequest, QueryResponse
from schemas.topics import DOCUMENTS, FOREVER, TOPICS, Topic
from schemas.webhooks import NewWebhook, Webhook, WebhookCreated, WebhookMessage, Webhooks
from streams.topology import TOPOLOGY

MODELS: Final[tuple[type[BaseModel], ...]] = (
    DocumentEvent,
    ChunkPlan,
    IndexChange,
    EventEnded,
    StoredChunk,
    Manifest,
    DocumentText,
    BatchItem,
    BatchResponse,
    Accepted,
    DocumentState,
    EventStatus,
    EventsRequest,
    EventsResponse,
    DeletionReceipt,
    DeadLetter,
    DeadLetterContent,
    DeadLetters,
    DeadLetterResolved,
    Replayed,
    NewWebhook,
    Webhook,
    WebhookCreated,
    Webhooks,
    WebhookMessage,
    QueryRequest,
    QueryResponse,
    Problem,
)
CLOUD_EVENT_HEADERS: Final[Mapping[str, Mapping[str, str]]] = {
    "content-type": {"const": "application/json"},
    "ce_specversion": {"const": "1.0"},
    "ce_id": {"description": "Id of the document event, identical in all topics."},
    "ce_source": {"const": "/freshline"},
    "ce_type": {"description": "Name and version of the message."},
    "ce_subject": {"description": "`tenant/document_id`, as in the record key."},
    "ce_time": {"format": "date-time"},
    "traceparent": {"description": "W3C trace context, if the client sent one."},
}
_DEAD_LETTER: Final = "DeadLetter"
_ROOT: Final = Path(__file__).parent.parent / "docs"
_CONTRACTS: Final = "contracts"


def contracts() -> Iterator[tuple[str, str]]:
    """(path below ``docs``, text) of every generated file."""
    # Defaults only: contracts do not depend on the environment.
    settings = Settings.model_construct()
    for model in MODELS:
        dialect = {"$schema": GenerateJsonSchema.schema_dialect}
        yield f"{_CONTRACTS}/schemas/{model.__name__}.json", _json(dialect | model.model_json_schema())
    yield f"{_CONTRACTS}/openapi-ingest.json", _json(_ingest_app(settings).openapi())
    yield f"{_CONTRACTS}/openapi-query.json", _json(_query_app(settings).openapi())
    yield f"{_CONTRACTS}/asyncapi.json", _json(_asyncapi(settings))
    yield "configuration.md", _configuration()
    yield "cli.md", cli_reference()
    yield "metrics.md", metrics_reference()


def main(arguments: list[str]) -> int:
    """Write the files, or compare them with ``--check``. Returns the exit code."""
    check = "--check" in arguments
    wanted = {_ROOT / name: text for name, text in contracts()}
    stale = [file for file, text in wanted.items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
    leftover = sorted(set((_ROOT / _CONTRACTS).rglob("*.json")) - set(wanted))
    for file in stale if not check else ():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(wanted[file], encoding="utf-8")
    for file in leftover if not check else ():
        file.unlink()
    for file in stale:
        _report(file, "is outdated: run `make schemas`" if check else "written")
    for file in leftover:
        _report(file, "is obsolete: run `make schemas`" if check else "removed")
    return int(check and bool(stale or leftover))


def _report(file: Path, state: str) -> None:
    sys.stderr.write(f"docs/{file.relative_to(_ROOT)} {state}\n")


def _ingest_app(settings: Settings) -> FastAPI:
    # In-memory twins: a description needs no servers.
    streams, states = MemoryStreams(1), MemoryEventStates()
    stores = Stores(
        MemoryBlobStore(),
        streams,
        MemoryVersions(),
        states,
        cast("Any", None),
        MemoryAnswerCache(),
        streams.read_partition,
        streams,
    )
    credentials = Credentials(settings)
    dead_letters = DeadLetterQueue(streams.read_to_end, streams, EventLog(streams, states))
    return build_api(
        settings,
        stores,
        dead_letters,
        MemoryWebhooks(),
        credentials=credentials,
        required={},
        useful={},
        registry=CollectorRegistry(),
    )


def _query_app(settings: Settings) -> FastAPI:
    unused = cast("Any", None)
    return build_app(
        ApiServices(unused, unused, unused, Operations({}, RollingStats())),
        ApiPolicy(Credentials(settings)),
        ApiTelemetry(CollectorRegistry()),
    )


def _asyncapi(settings: Settings) -> dict[str, Any]:
    messages = {row.reads.name: row.message.__name__ for row in TOPOLOGY.values()}
    operations: dict[str, Any] = {
        "ingest.send.documents.v1": {
            "action": "send",
            "summary": "accept an upload, an update or a delete",
            "channel": {"$ref": f"#/channels/{DOCUMENTS.name}"},
        }
    }
    for step, row in TOPOLOGY.items():
        operations[f"{step}.receive.{row.reads.name}"] = {
            "action": "receive",
            "summary": row.about,
            "channel": {"$ref": f"#/channels/{row.reads.name}"},
            "bindings": {"kafka": {"groupId": {"const": settings.names.group(step)}}},
        }
        for written in (row.writes, row.dead_letters):
            if written is not None:
                operations[f"{step}.send.{written.name}"] = {
                    "action": "send",
                    "channel": {"$ref": f"#/channels/{written.name}"},
                }
    described = {row.message.__name__: _message(row.message) for row in TOPOLOGY.values()}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Freshline streams",
            "version": "1",
            "description": "Document events flow one way. All topics have the same partition count and the same key, "
            "so the events of a document stay in order. Delivery is at least once; effects are idempotent.",
        },
        "defaultContentType": "application/json",
        "servers": {"kafka": {"host": settings.kafka.bootstrap_servers, "protocol": "kafka"}},
        "channels": {topic.name: _channel(topic, messages.get(topic.name, _DEAD_LETTER), settings) for topic in TOPICS},
        "operations": operations,
        "components": {"messages": described | {_DEAD_LETTER: _dead_letter()}},
    }


def _channel(topic: Topic, message: str, settings: Settings) -> dict[str, Any]:
    retention = "indefinitely" if topic.retention_ms == FOREVER else f"{topic.retention_ms // 86_400_000} days"
    return {
        "address": f"{{namespace}}.{topic.name}",
        "description": f"{topic.about}; retained {retention}",
        "parameters": {"namespace": {"default": settings.namespace, "description": "One for each installation."}},
        "messages": {message: {"$ref": f"#/components/messages/{message}"}},
        "bindings": {
            "kafka": {
                "partitions": settings.kafka.partitions,
                "replicas": settings.kafka.replication,
                "topicConfiguration": {"retention.ms": topic.retention_ms},
            }
        },
    }


def _message(model: type[StreamMessage]) -> dict[str, Any]:
    headers: dict[str, Any] = {name: {"type": "string", **schema} for name, schema in CLOUD_EVENT_HEADERS.items()}
    headers["ce_type"] = {"type": "string", "const": EVENT_TYPES[model]}
    return {
        "summary": (model.__doc__ or "").splitlines()[0],
        "headers": {
            "type": "object",
            "properties": headers,
            "required": [name for name in headers if name != "traceparent"],
        },
        "payload": {"$ref": f"schemas/{model.__name__}.json"},
        "bindings": {"kafka": {"key": {"type": "string", "description": "tenant/document_id"}}},
    }


def _dead_letter() -> dict[str, Any]:
    headers = {name: {"type": "string", "description": about} for name, about in DEAD_LETTER_HEADERS.items()}
    return {
        "summary": "A record that a step could not process: its key, value and headers, and the reason.",
        "headers": {"type": "object", "properties": headers, "required": list(headers)},
        "payload": True,
        "bindings": {"kafka": {"key": {"type": "string", "description": "key of the original record"}}},
    }


def _configuration() -> str:
    lines = [_ABOUT_SETTINGS]
    unsectioned = {name: one for name, one in Settings.model_fields.items() if not _is_section(one.annotation)}
    lines += ["## General", "", *_table("FRESHLINE_", unsectioned, Settings.BASIC), ""]
    for name, one in Settings.model_fields.items():
        section = one.annotation
        if section is not None and _is_section(section):
            about = (section.__doc__ or "").splitlines()[0]
            lines += [
                f"## {name}",
                "",
                about,
                "",
                *_table(f"FRESHLINE_{name.upper()}__", section.model_fields, section.BASIC),
                "",
            ]
    return "\n".join([*lines, _ABOUT_LOCAL])


_ABOUT_SETTINGS: Final = """# Configuration

<!-- Generated from infra/settings.py by `make schemas`; the descriptions are edited there. -->

Every process reads its settings from the environment when it starts, and exits if one is invalid. `freshline up` and
`freshline demo` set the addresses of their own servers. To use MSK, OpenSearch Service, ElastiCache and S3, set their
addresses.

Most installations set some of the *basic* settings only. The defaults of the *advanced* ones suit most installations.
"""

_ABOUT_LOCAL: Final = """## Local stack and tests

Variables of the commands that run the local stack and the tests.

| variable | default | meaning |
|---|---|---|
| `FRESHLINE_HOME` | the user's data directory; for root `/var/lib/freshline` | Data of the local installation. |
| `FRESHLINE_CACHE` | the user's cache directory; for root `/var/cache/freshline` | Downloaded servers and models. |
| `OPENSEARCH_JAVA_HOME`, `JAVA_HOME` |  | Preferred JDK. |
| `FRESHLINE_TEST_STACK` |  | Data directory of a running stack for the tests. Without it, tests start their own. |
| `FRESHLINE_TEST_HOME` | a temporary directory | Data directory of the stack that tests start; if set, it is kept. |
"""


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _table(prefix: str, fields: Mapping[str, FieldInfo], basic: AbstractSet[str]) -> Iterator[str]:
    """Rows of the basic settings, then of the advanced ones."""
    yield "| variable | default | level | meaning |"
    yield "|---|---|---|---|"
    for name, one in sorted(fields.items(), key=lambda field: field[0] not in basic):
        default = "" if one.default is None else f"`{one.default}`"
        level = "basic" if name in basic else "advanced"
        yield f"| `{prefix}{name.upper()}` | {default} | {level} | {one.description}{_constraints(one)} |"


def _constraints(one: FieldInfo) -> str:
    """Allowed values of a setting, if enumerated or bounded."""
    if get_origin(one.annotation) is Literal:
        return f" One of {', '.join(f'`{word}`' for word in get_args(one.annotation))}."
    bounds = []
    for bound in one.metadata:
        match bound:
            case Ge():
                bounds.append(f"at least {bound.ge}")
            case Gt():
                bounds.append(f"more than {bound.gt}")
            case Le():
                bounds.append(f"at most {bound.le}")
    return f" {', '.join(bounds).capitalize()}." if bounds else ""


def _json(value: Mapping[str, Any]) -> str:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
