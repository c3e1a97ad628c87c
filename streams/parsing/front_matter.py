"""Reads front matter: attributes of a document in YAML or TOML at its beginning.

YAML is delimited by a line ``---`` and a line ``---`` or ``...``, TOML by two lines ``+++``. A block that is not a
mapping is text. So is everything after a thematic break (``---``) that is followed by a blank line, as in Pandoc.

Only parser events are used: tags construct no objects, aliases are not expanded, and nesting is limited. Scalars follow
the core schema of YAML 1.2, so ``no``, ``12:30`` and dates remain text.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, time
from typing import Any, Final

import yaml

from schemas.documents import (
    MAX_METADATA_ENTRIES,
    MAX_METADATA_NAME_CHARS,
    MAX_METADATA_VALUE_CHARS,
    IndexedMetadata,
    IndexedMetadataValue,
    MetadataValue,
)

MAX_FRONT_MATTER_CHARS: Final = 32_000
"""Longer blocks are text. The parser runs in the worker, and front matter is short."""

_MAX_TOML_CHARS: Final = 8_000
"""Limit for TOML: ``tomllib`` takes quadratic time for dotted keys."""

MAX_METADATA_CHARS: Final = 8_000
"""Limit of all names and values of one front matter, because they are stored with every passage."""

_MAX_DEPTH: Final = 20
_MAX_EXACT_INT: Final = 2**53 - 1

_YAML_OPENING: Final = re.compile(r"(?:[ \t]*\n)*---[ \t]*\n(?=[ \t]*\S)")
_YAML_CLOSING: Final = re.compile(r"^(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.MULTILINE)
_TOML_OPENING: Final = re.compile(r"(?:[ \t]*\n)*\+\+\+[ \t]*\n")
_TOML_CLOSING: Final = re.compile(r"^\+\+\+[ \t]*(?:\n|\Z)", re.MULTILINE)
_FLOAT: Final = re.compile(r"-?\d+\.\d+(?:[eE][-+]?\d+)?")
_INT: Final = re.compile(r"-?\d{1,16}")

_TITLE: Final = "title"
_DESCRIPTIONS: Final = ("description", "summary")
_COMMA_SEPARATED: Final = frozenset({"tags", "keywords", "categories"})


@dataclass(frozen=True, slots=True)
class FrontMatter:
    """Attributes of a document.

    Attributes:
        title: title in one line.
        description: description, unchanged.
        metadata: other scalars and lists of scalars, within the limits of metadata.
        end: offset of the text after the front matter.
    """

    title: str | None
    description: str | None
    metadata: IndexedMetadata
    end: int


@dataclass(frozen=True, slots=True)
class _Scalar:
    text: str
    value: MetadataValue | None


_Node = _Scalar | list[Any] | dict[str, Any] | None
"""A parsed node; None for omitted nodes, such as an alias of a collection."""


class _Unreadable(ValueError):
    """The block is not a mapping within the limits."""


def read_front_matter(text: str) -> FrontMatter | None:
    """Front matter at the beginning of a text, or None.

    Args:
        text: text with LF line ends and without a byte order mark.
    """
    for opening, closing, read, max_chars in (
        (_YAML_OPENING, _YAML_CLOSING, _yaml_mapping, MAX_FRONT_MATTER_CHARS),
        (_TOML_OPENING, _TOML_CLOSING, _toml_mapping, _MAX_TOML_CHARS),
    ):
        if (opened := opening.match(text)) is None:
            continue
        closed = closing.search(text, opened.end())
        if closed is None or closed.start() - opened.end() > max_chars:
            return None
        try:
            return _attributes(read(text[opened.end() : closed.start()]), closed.end())
        except (yaml.YAMLError, ValueError, RecursionError):
            return None
    return None


def _attributes(mapping: Mapping[str, _Node], end: int) -> FrontMatter:
    known: dict[str, _Node] = {}
    for written, node in mapping.items():
        name = written.strip().casefold()
        # Of names that differ only in case, the first one with text.
        if _text(known.get(name)) is None:
            known[name] = node
    title = _text(known.get(_TITLE))
    description = next(filter(None, (_text(known.get(name)) for name in _DESCRIPTIONS)), None)
    used = {_TITLE, next((name for name in _DESCRIPTIONS if _text(known.get(name))), "")}
    metadata: dict[str, IndexedMetadataValue] = {}
    room = MAX_METADATA_CHARS
    for written, node in mapping.items():
        name = written.strip()
        if name.casefold() in used or not 0 < len(name) <= MAX_METADATA_NAME_CHARS:
            continue
        name = name.casefold() if name.casefold() in _COMMA_SEPARATED else name
        value = _metadata_value(name, node)
        if value is None:
            continue
        size = len(name) + (sum(map(len, value)) if isinstance(value, tuple) else len(str(value)))
        if size <= room and len(metadata) < MAX_METADATA_ENTRIES:
            metadata[name] = value
            room -= size
    return FrontMatter(" ".join(title.split()) if title else None, description, metadata, end)


def _text(node: _Node) -> str | None:
    return node.text.strip() or None if isinstance(node, _Scalar) and node.value is not None else None


def _metadata_value(name: str, node: _Node) -> IndexedMetadataValue | None:
    """The value as metadata; None if it is empty, nested, or too long."""
    if isinstance(node, _Scalar) and name in _COMMA_SEPARATED and isinstance(node.value, str):
        node = [_Scalar(part, part) for part in node.value.split(",")]
    if isinstance(node, list):
        texts = (_text(one) for one in node)
        values = tuple(dict.fromkeys(text for text in texts if text and len(text) <= MAX_METADATA_VALUE_CHARS))
        return values or None
    if not isinstance(node, _Scalar):
        return None
    value = node.value.strip() if isinstance(node.value, str) else node.value
    too_long = isinstance(value, str) and not 0 < len(value) <= MAX_METADATA_VALUE_CHARS
    return None if too_long else value


@dataclass(slots=True)
class _YamlReader:
    """Builds nodes from events. Only scalars of anchors are kept, so nodes cannot multiply."""

    events: Iterator[yaml.Event]
    scalars: dict[str, _Scalar] = field(default_factory=dict)

    def node(self, event: yaml.Event, depth: int) -> _Node:
        if depth > _MAX_DEPTH:
            raise _Unreadable("nested too deeply")
        if isinstance(event, yaml.AliasEvent):
            return self.scalars.get(event.anchor or "")
        if isinstance(event, yaml.ScalarEvent):
            scalar = _yaml_scalar(event)
            if event.anchor:
                self.scalars[event.anchor] = scalar
            return scalar
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[_Node] = []
            while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
                items.append(self.node(event, depth + 1))
            return items
        pairs: dict[str, _Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.node(event, depth + 1)
            value = self.node(next(self.events), depth + 1)
            if isinstance(key, _Scalar) and key.text != "<<":
                pairs[key.text] = value
        return pairs


def _yaml_mapping(block: str) -> Mapping[str, _Node]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    events = iter(yaml.parse(block, Loader=loader))
    opening_events = [next(events), next(events)]
    root = next(events) if isinstance(opening_events[-1], yaml.DocumentStartEvent) else None
    if not isinstance(root, yaml.MappingStartEvent):
        raise _Unreadable("no mapping")
    mapping = _YamlReader(events).node(root, 0)
    closing_events = [next(events), next(events)]
    if not isinstance(mapping, dict) or not isinstance(closing_events[-1], yaml.StreamEndEvent):
        raise _Unreadable("more than one document")
    return mapping


def _yaml_scalar(event: yaml.ScalarEvent) -> _Scalar:
    text = str(event.value)
    plain = event.implicit[0]
    return _Scalar(text, _plain_value(text) if plain else text)


def _plain_value(text: str) -> MetadataValue | None:
    """Value of a plain scalar. It is a number only if formatting the number yields the same text, unlike ``007``."""
    if text in {"", "~", "null", "Null", "NULL"}:
        return None
    if text in {"true", "True", "TRUE", "false", "False", "FALSE"}:
        return text.lower() == "true"
    if _INT.fullmatch(text) and str(int(text)) == text and abs(int(text)) <= _MAX_EXACT_INT:
        return int(text)
    if _FLOAT.fullmatch(text) and str(float(text)) == text:
        return float(text)
    return text


def _toml_mapping(block: str) -> Mapping[str, _Node]:
    return {name: _toml_node(value) for name, value in tomllib.loads(block).items()}


def _toml_node(value: object, depth: int = 0) -> _Node:
    if isinstance(value, list):
        return [_toml_node(one, depth + 1) for one in value] if depth == 0 else None
    if isinstance(value, dict):
        return None
    if isinstance(value, str):
        return _Scalar(value, value)
    if isinstance(value, date | time):  # a datetime is a date
        return _Scalar(value.isoformat(), value.isoformat())
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return _Scalar(text, _plain_value(text))
