"""Topic ids (KIP-516). The metadata requests of aiokafka have versions that do not return them."""

from io import BytesIO
from typing import Any, Final
from uuid import UUID

from aiokafka.protocol.abstract import AbstractType
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Boolean, CompactArray, CompactString, Int16, Int32, Schema, TaggedFields
from typing_extensions import override

_METADATA: Final = 3
_VERSION: Final = 12
"""Kafka 3.1 and newer."""

_NO_ID: Final = UUID(int=0)
_TEXT: Final = CompactString("utf-8")


class _Uuid(AbstractType):  # type: ignore[misc]  # aiokafka is not typed
    @classmethod
    def encode(cls, value: UUID) -> bytes:
        return value.bytes

    @classmethod
    def decode(cls, data: BytesIO) -> UUID:
        return UUID(bytes=data.read(16))


class _MetadataResponse(Response):  # type: ignore[misc]
    API_KEY = _METADATA
    API_VERSION = _VERSION
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            CompactArray(
                ("node_id", Int32), ("host", _TEXT), ("port", Int32), ("rack", _TEXT), ("tagged_fields", TaggedFields)
            ),
        ),
        ("cluster_id", _TEXT),
        ("controller_id", Int32),
        (
            "topics",
            CompactArray(
                ("error_code", Int16),
                ("topic", _TEXT),
                ("topic_id", _Uuid),
                ("is_internal", Boolean),
                (
                    "partitions",
                    CompactArray(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", CompactArray(Int32)),
                        ("isr", CompactArray(Int32)),
                        ("offline_replicas", CompactArray(Int32)),
                        ("tagged_fields", TaggedFields),
                    ),
                ),
                ("authorized_operations", Int32),
                ("tagged_fields", TaggedFields),
            ),
        ),
        ("tagged_fields", TaggedFields),
    )


class _MetadataRequestV12(RequestStruct):  # type: ignore[misc]
    FLEXIBLE_VERSION = True
    API_KEY = _METADATA
    API_VERSION = _VERSION
    RESPONSE_TYPE = _MetadataResponse
    SCHEMA = Schema(
        ("topics", CompactArray(("topic_id", _Uuid), ("topic", _TEXT), ("tagged_fields", TaggedFields))),
        ("allow_auto_topic_creation", Boolean),
        ("include_topic_authorized_operations", Boolean),
        ("tagged_fields", TaggedFields),
    )


class TopicIdRequest(Request[_MetadataRequestV12]):  # type: ignore[misc]
    """Metadata request for one topic by name. Does not create it."""

    API_KEY = _METADATA

    def __init__(self, topic: str) -> None:
        self._topic = topic

    @override
    def build(self, request_struct_class: type[_MetadataRequestV12]) -> _MetadataRequestV12:
        return request_struct_class([(_NO_ID, self._topic, {})], False, False, {})  # noqa: FBT003 - positional in aiokafka


def read_topic_id(response: Any) -> UUID | None:
    """Id of the topic, or None if it does not exist."""
    [(error_code, _name, topic_id, *_rest)] = response.topics
    return None if error_code or topic_id == _NO_ID else topic_id
