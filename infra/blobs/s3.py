"""Blobs as S3 objects named ``PREFIX`` + ``abcd…``."""

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from typing_extensions import override

from infra.blobs.port import BlobMissing, BlobStore, BlobStoreUnavailable, checked, ref_of
from schemas.events import BlobRef

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import ListObjectsV2OutputTypeDef

T = TypeVar("T")

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_THREADS: Final = 16
_MAX_PUTS: Final = 3
_MISSING: Final = frozenset({"404", "NoSuchKey", "NotFound"})
_PRESENT: Final = frozenset({"412", "PreconditionFailed"})
_CONFLICT: Final = frozenset({"409", "ConditionalRequestConflict"})


class S3BlobStore(BlobStore):
    """Blobs in one bucket, through boto3 in threads.

    An object is written only if it does not exist (``If-None-Match``), with its SHA-256, which S3 verifies. No
    encryption header is sent, so the default of the bucket applies: SSE-S3, or a KMS key.
    """

    def __init__(self, *, bucket: str, prefix: str, region: str | None, endpoint_url: str | None) -> None:
        """Use an existing ``bucket``, with the default AWS credential chain."""
        self._bucket = bucket
        self._prefix = prefix
        self._client: S3Client = boto3.client(
            "s3",
            region_name=region,
            endpoint_url=endpoint_url,
            config=Config(
                connect_timeout=3,
                read_timeout=10,
                retries={"mode": "standard", "total_max_attempts": 3},
                max_pool_connections=_THREADS,
            ),
        )
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="blobs")

    @override
    async def put(self, content: bytes) -> BlobRef:
        ref = ref_of(content)
        await self._run(lambda: self._put(ref, content))
        return ref

    @override
    async def get(self, ref: BlobRef) -> bytes:
        return await self._run(lambda: self._get(ref))

    @override
    async def exists(self, ref: BlobRef) -> bool:
        return await self._run(lambda: self._exists(ref))

    @override
    async def delete(self, ref: BlobRef) -> None:
        await self._run(lambda: self._client.delete_object(Bucket=self._bucket, Key=self._key(ref)))

    @override
    async def stored(self) -> AsyncIterator[BlobRef]:
        pages = iter(self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix))
        while (page := await self._run(lambda: next(pages, None))) is not None:
            for ref in self._refs(page):
                yield ref

    @override
    async def close(self) -> None:

        await asyncio.to_thread(self._threads.shutdown)
        self._client.close()

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except (BotoCoreError, ClientError) as error:
            raise BlobStoreUnavailable(f"S3 bucket {self._bucket}: {error}") from error

    def _key(self, ref: BlobRef) -> str:
        return f"{self._prefix}{ref.sha256}"

    def _put(self, ref: BlobRef, content: bytes) -> None:
        for attempt in range(1, _MAX_PUTS + 1):
            try:
                self._client.put_object(
                    Bucket=self._bucket,
                    Key=self._key(ref),
                    Body=content,
                    ContentType="application/octet-stream",
                    IfNoneMatch="*",
                    ChecksumSHA256=base64.b64encode(bytes.fromhex(ref.sha256)).decode(),
                )
            except ClientError as error:
                code = _code(error)
                if code in _PRESENT:
                    return
                # A concurrent write or deletion of the same object; S3 requests a retry.
                if code not in _CONFLICT or attempt == _MAX_PUTS:
                    raise
            else:
                return

    def _get(self, ref: BlobRef) -> bytes:
        try:
            body = self._client.get_object(Bucket=self._bucket, Key=self._key(ref))["Body"]
        except ClientError as error:
            if _code(error) in _MISSING:
                raise BlobMissing(ref) from None
            raise
        with body:
            return checked(ref, body.read())

    def _exists(self, ref: BlobRef) -> bool:
        try:
            self._client.head_object(Bucket=self._bucket, Key=self._key(ref))
        except ClientError as error:
            if _code(error) in _MISSING:
                return False
            raise
        return True

    def _refs(self, page: "ListObjectsV2OutputTypeDef") -> Iterator[BlobRef]:
        for item in page.get("Contents", ()):
            name = item["Key"].removeprefix(self._prefix)
            if _SHA256.fullmatch(name):
                yield BlobRef(sha256=name, size_bytes=item["Size"])


def _code(error: ClientError) -> str:
    return error.response.get("Error", {}).get("Code", "")
