"""The contract of BlobStore, run on the memory twin, on a local disk and on S3 of a moto server."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import boto3
import pytest
from moto.server import ThreadedMotoServer

from infra.blobs import open_blob_store
from infra.blobs.local import LocalBlobStore
from infra.blobs.memory import MemoryBlobStore
from infra.blobs.port import BlobCorrupt, BlobMissing, BlobStore, BlobStoreUnavailable, ref_of
from infra.blobs.s3 import S3BlobStore
from infra.settings import BlobSettings
from schemas.events import BlobRef


class Subject(NamedTuple):
    store: BlobStore
    tamper: Callable[[BlobRef, bytes], None]


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["memory", "local", "s3"])
async def subject(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Subject]:
    if request.param == "memory":
        memory = MemoryBlobStore()
        subject = Subject(memory, lambda ref, content: memory._contents.update({ref.sha256: content}))
    elif request.param == "local":
        local = LocalBlobStore(tmp_path / "blobs")
        subject = Subject(local, lambda ref, content: local._file(ref).write_bytes(content) and None)
    else:
        subject = make_s3_subject(request.getfixturevalue("s3_endpoint"), f"bucket-{time.time_ns()}", monkeypatch)
    yield subject
    await subject.store.close()


def make_s3_subject(endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Subject:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket=bucket)
    store = open_blob_store(
        BlobSettings(store="s3", bucket=bucket, prefix="contents/", endpoint_url=endpoint, region="us-east-1")
    )
    return Subject(
        store,
        lambda ref, content: client.put_object(Bucket=bucket, Key=f"contents/{ref.sha256}", Body=content) and None,
    )


@pytest.mark.parametrize("content", [b"", b"one page", b"\x00\xff" * 300_000])
async def test_a_stored_blob_is_read_back(subject: Subject, content: bytes) -> None:
    ref = await subject.store.put(content)
    assert ref == ref_of(content)
    assert await subject.store.exists(ref)
    assert await subject.store.get(ref) == content


async def test_equal_content_is_stored_once(subject: Subject) -> None:
    refs = {await subject.store.put(b"same") for _ in range(2)}
    assert [ref async for ref in subject.store.stored()] == list(refs)


async def test_equal_content_stored_concurrently_is_stored_once(subject: Subject) -> None:
    refs = set(await asyncio.gather(*(subject.store.put(b"crowd") for _ in range(20))))
    assert [ref async for ref in subject.store.stored()] == list(refs)
    assert await subject.store.get(refs.pop()) == b"crowd"


async def test_a_missing_blob_raises(subject: Subject) -> None:
    ref = ref_of(b"never put")
    assert not await subject.store.exists(ref)
    with pytest.raises(BlobMissing, match=ref.sha256):
        await subject.store.get(ref)


async def test_a_corrupt_blob_raises_and_a_new_upload_repairs_it(subject: Subject) -> None:
    ref = await subject.store.put(b"right")
    subject.tamper(ref, b"wrong")
    with pytest.raises(BlobCorrupt, match=ref.sha256):
        await subject.store.get(ref)
    await subject.store.delete(ref)
    await subject.store.put(b"right")
    assert await subject.store.get(ref) == b"right"


async def test_delete_is_idempotent_and_removes_only_its_blob(subject: Subject) -> None:
    kept, deleted = await subject.store.put(b"kept"), await subject.store.put(b"gone")
    for _ in range(2):
        await subject.store.delete(deleted)
    assert not await subject.store.exists(deleted)
    assert await subject.store.get(kept) == b"kept"


async def test_all_blobs_are_listed_with_sizes(subject: Subject) -> None:
    refs = {await subject.store.put(b"x" * size) for size in range(30)}
    assert {ref async for ref in subject.store.stored()} == refs


async def test_s3_lists_several_pages(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_s3_subject(s3_endpoint, "paged", monkeypatch).store
    assert isinstance(store, S3BlobStore)
    refs = set(await asyncio.gather(*(store.put(str(number).encode()) for number in range(1_005))))
    assert {ref async for ref in store.stored()} == refs
    await store.close()


async def test_s3_errors_name_the_bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    store = S3BlobStore(bucket="no-such-bucket", prefix="", region="us-east-1", endpoint_url=s3_endpoint)
    with pytest.raises(BlobStoreUnavailable, match="no-such-bucket"):
        await store.put(b"x")
    await store.close()


def test_s3_without_a_bucket_is_rejected() -> None:
    with pytest.raises(ValueError, match="FRESHLINE_BLOBS__BUCKET"):
        open_blob_store(BlobSettings(store="s3"))


async def test_a_full_or_read_only_local_disk_raises(tmp_path: Path) -> None:
    store = LocalBlobStore(tmp_path / "blobs")
    (tmp_path / "blobs" / ref_of(b"x").sha256[:2]).write_text("a file where a directory must be")
    with pytest.raises(BlobStoreUnavailable, match="blob directory"):
        await store.put(b"x")
    assert list((tmp_path / "blobs" / "incoming").iterdir()) == []
    await store.close()


async def test_a_killed_local_writer_leaves_no_visible_blob(tmp_path: Path) -> None:
    """The child is killed in its first fsync: all bytes are written, and the name does not exist yet."""
    code = (
        "import asyncio, os, signal, sys; from pathlib import Path\n"
        "from infra.blobs.local import LocalBlobStore\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL) if os.listdir(sys.argv[1] + '/incoming') else None\n"
        "asyncio.run(LocalBlobStore(Path(sys.argv[1])).put(b'half'))\n"
    )
    root = tmp_path / "blobs"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code, str(root)], env=env, check=False)
    assert killed.returncode == -9
    store = LocalBlobStore(root)
    ref = ref_of(b"half")
    [partial_file] = (root / "incoming").iterdir()
    assert not await store.exists(ref)
    assert [found async for found in store.stored()] == []
    await store.put(b"half")
    assert await store.get(ref) == b"half"
    await store.close()
    await LocalBlobStore(root).close()
    assert partial_file.exists(), "its writer may still be running"
    yesterday_s = time.time() - 86_401
    os.utime(partial_file, (yesterday_s, yesterday_s))
    store = LocalBlobStore(root)
    assert not partial_file.exists()
    assert await store.get(ref) == b"half"
    await store.close()
