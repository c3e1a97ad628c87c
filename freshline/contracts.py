"""Writes what others build on: JSON Schemas, OpenAPI, AsyncAPI, and the table of settings. CI compares them.

``python -m freshline.contracts`` writes, ``--check`` compares and exits with 1 where a file is not current.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeGuard, cast

import orjson
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from infra.blobs.memory import MemoryBlobStore
from infra.kafka.memory import MemoryStreams
from infra.redis.memory_states import MemoryEventStates, MemoryVersions
from infra.settings import Section, Settings
from infra.web.credentials import Credentials
from ingest.accept import Stores
from ingest.api import build_api
from query.api import build_app
from schemas.documents import Accepted, DocumentState, EventStatus
from schemas.events import EVENT_TYPES, ChunkPlan, DocumentEvent, IndexChange
from schemas.index import Manifest, StoredChunk
from schemas.problems import Problem
from schemas.queries import QueryRequest, QueryResponse
from schemas.topics import FOREVER, TOPICS
from streams.topology import TOPOLOGY

MODELS: Final[tuple[type[BaseModel], ...]] = (
    DocumentEvent,
    ChunkPlan,
    IndexChange,
    StoredChunk,
    Manifest,
    Accepted,
    DocumentState,
    EventStatus,
    QueryRequest,
    QueryResponse,
    Problem,
)
_ROOT: Final = Path(__file__).parent.parent / "docs"


def contracts() -> Iterator[tuple[str, str]]:
    """Path below ``docs`` and text of every generated file."""
    for model in MODELS:
        yield f"contracts/schemas/{model.__name__}.json", _json(model.model_json_schema())
    yield "contracts/openapi-ingest.json", _json(_ingest_app().openapi())
    yield "contracts/openapi-query.json", _json(_query_app().openapi())
    yield "contracts/asyncapi.json", _json(_asyncapi())
    yield "configuration.md", _configuration()


def main(arguments: list[str]) -> int:
    """Write or compare; 0 is success."""
    check = "--check" in arguments
    stale = []
    for name, text in contracts():
        file = _ROOT / name
        if file.is_file() and file.read_text() == text:
            continue
        stale.append(name)
        if not check:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    for name in stale:
        sys.stderr.write(f"docs/{name} {'is not current: run `make schemas`' if check else 'written'}\n")
    return int(check and bool(stale))


def _ingest_app() -> FastAPI:
    # The twins serve: a description needs no servers.
    stores = Stores(MemoryBlobStore(), MemoryStreams(1), MemoryVersions(), MemoryEventStates(), cast("Any", None))
    return build_api(Settings(), stores, required={}, useful={}, registry=CollectorRegistry())


def _query_app() -> FastAPI:
    credentials = Credentials(Settings().tenant)
    return build_app(cast("Any", None), credentials=credentials, parts={}, registry=CollectorRegistry())


def _asyncapi() -> dict[str, Any]:
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    messages = {row.reads.name: row.message for row in TOPOLOGY.values()}
    for topic in TOPICS:
        kept = "for ever" if topic.retention_ms == FOREVER else f"{topic.retention_ms // 86_400_000} days"
        model = messages.get(topic.name)
        channels[topic.name] = {
            "address": f"{{namespace}}.{topic.name}",
            "description": f"{topic.about}; kept {kept}",
            "parameters": {"namespace": {"default": Settings().namespace}},
            "messages": {} if model is None else {model.__name__: {"$ref": f"#/components/messages/{model.__name__}"}},
        }
    for step, row in TOPOLOGY.items():
        operations[f"{step}.receive"] = {
            "action": "receive",
            "summary": row.about,
            "channel": {"$ref": f"#/channels/{row.reads.name}"},
        }
        for written in (row.writes, row.dead_letters):
            if written is not None:
                operations[f"{step}.send.{written.name}"] = {
                    "action": "send",
                    "channel": {"$ref": f"#/channels/{written.name}"},
                }
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "Freshline streams", "version": "1"},
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": operations,
        "components": {"messages": {model.__name__: _message(model) for model in messages.values()}},
    }


def _message(model: type[DocumentEvent | ChunkPlan | IndexChange]) -> dict[str, Any]:
    text = {"type": "string"}
    names = ("ce_specversion", "ce_id", "ce_source", "ce_type", "ce_subject", "ce_time", "traceparent")
    headers = dict.fromkeys(names, text) | {"ce_type": {"const": EVENT_TYPES[model]}}
    schema = model.model_json_schema(ref_template=f"schemas/{model.__name__}.json#/$defs/{{model}}")
    return {
        "summary": (schema.get("description") or "").splitlines()[0],
        "headers": {"type": "object", "properties": headers},
        "payload": {"$ref": f"schemas/{model.__name__}.json"},
        "bindings": {"kafka": {"key": {"type": "string", "description": "tenant/document_id"}}},
    }


def _configuration() -> str:
    lines = [
        "# Configuration",
        "",
        "Every process reads its settings from the environment, once, when it starts.",
        "Generated by `make schemas` from `infra/settings.py`.",
        "",
    ]
    plain = {name: one for name, one in Settings.model_fields.items() if not _is_section(one.annotation)}
    lines += ["## General", "", *_table("FRESHLINE_", plain), ""]
    for name, one in Settings.model_fields.items():
        section = one.annotation
        if section is not None and _is_section(section):
            about = (section.__doc__ or "").splitlines()[0]
            lines += [f"## {name}", "", about, "", *_table(f"FRESHLINE_{name.upper()}__", section.model_fields), ""]
    return "\n".join(lines).rstrip() + "\n"


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _table(prefix: str, fields: Mapping[str, Any]) -> Iterator[str]:
    yield "| variable | default | meaning |"
    yield "|---|---|---|"
    for name, one in fields.items():
        default = "" if one.default in {None, PydanticUndefined} else f"`{one.default}`"
        words = getattr(one.annotation, "__args__", ()) if "Literal" in str(one.annotation) else ()
        taken = f" One of {', '.join(f'`{word}`' for word in words)}." if words else ""
        yield f"| `{prefix}{name.upper()}` | {default} | {one.description}{taken} |"


def _json(value: Mapping[str, Any]) -> str:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS).decode() + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
