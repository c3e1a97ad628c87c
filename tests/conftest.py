"""The real servers, started once for a session, and settings that give each test names of its own."""

import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import fastapi.dependencies.models
import httpx
import hypothesis
import pytest
import redis.asyncio
import structlog
from aiokafka.admin import AIOKafkaAdminClient
from xdist.scheduler import LoadScopeScheduling

from infra.local import Stack, StackConfig, models_dir
from infra.settings import Settings

hypothesis.settings.register_profile("no-deadline", hypothesis.settings.default, deadline=None)
hypothesis.settings.load_profile("no-deadline")
# Until a process configures its logging, structlog formats the local variables of each frame, which takes seconds.
_plain = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
structlog.configure(processors=[*structlog.get_config()["processors"][:-1], _plain])


def pytest_configure(config: pytest.Config) -> None:
    """Forget compiled loops older than their sources: numba does not notice a change in what they call."""
    if hasattr(config, "workerinput"):  # a process of pytest-xdist: the one that distributes the tests has done it
        return
    package = Path(__file__).parents[1] / "streams/core/invalidation"
    changed_s = max(source.stat().st_mtime for source in package.glob("*.py"))
    for compiled in (package / "__pycache__").glob("*.nb[ci]"):
        if compiled.stat().st_mtime < changed_s:
            compiled.unlink(missing_ok=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run load tests last, when another process of the suite has the least to do."""
    items.sort(key=lambda item: item.nodeid.startswith("tests/load/"))


class Distribution(LoadScopeScheduling):
    """Which tests run in the same process: those of servers and benchmarks, those of installations, those of a file."""

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(("tests/contract/", "tests/browser/", "tests/system/test_bench_")):
            return "servers"
        if nodeid.startswith(("tests/system/", "tests/load/")):
            return "installations"
        return nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Distribution:
    """Processes of one suite do not compete for servers: each has its own, and one of them has all installations."""
    return Distribution(config, log)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """A shell has what it runs in the background ignore Ctrl-C, and so would every process that a test starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def models() -> None:
    """The bundled models, downloaded where they are not yet: no test of a model is passed over."""
    os.environ.setdefault("FRESHLINE_EMBEDDING__MODELS_PATH", str(models_dir()))


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A process that a test plays configures its logging; the next test must not inherit it."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.fixture(scope="module", autouse=True)
def forgotten_apps() -> Iterator[None]:
    """FastAPI caches what it finds out about endpoints by endpoint; a process with many apps keeps all of them."""
    yield
    for one in vars(fastapi.dependencies.models).values():
        if hasattr(one, "cache_clear"):
            one.cache_clear()


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """A running stack: the one whose data directory FRESHLINE_TEST_STACK names, else one of this session's own."""
    if running := os.environ.get("FRESHLINE_TEST_STACK"):
        stack = Stack.open(StackConfig(data_dir=Path(running)))
        stack.environment()  # raises where it is not ready
        yield stack
        return
    reported = os.environ.get("FRESHLINE_TEST_HOME")
    home = Path(reported or tempfile.mkdtemp(prefix=f"freshline-tests-{os.geteuid()}-", dir="/var/tmp"))
    stack = Stack.open(StackConfig(data_dir=home))
    try:
        stack.up(fresh=True)
        yield stack
    finally:
        stack.down()
        if reported is None:
            shutil.rmtree(home)


@pytest.fixture
async def settings(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Settings]:
    """Settings of the stack with a namespace that no other test has; in the environment too, for child processes."""
    reported = stack.environment() | {
        "FRESHLINE_NAMESPACE": f"t-{secrets.token_hex(4)}",
        "FRESHLINE_KAFKA__PARTITIONS": "3",
        "FRESHLINE_OPENSEARCH__SHARDS": "2",
        "FRESHLINE_BLOBS__PATH": str(tmp_path / "blobs"),
    }
    for name, value in reported.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    yield settings
    await _remove_namespace(settings)


async def _remove_namespace(settings: Settings) -> None:
    namespace = settings.namespace
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    await admin.start()
    try:
        if topics := [topic for topic in await admin.list_topics() if topic.startswith(f"{namespace}.")]:
            await admin.delete_topics(topics)
    finally:
        await admin.close()
    async with httpx.AsyncClient(base_url=settings.opensearch.url, timeout=30) as client:
        (await client.delete(f"/{namespace}-*")).raise_for_status()
    async with redis.asyncio.Redis.from_url(settings.redis.url) as client:
        if keys := [key async for key in client.scan_iter(f"{namespace}:*", count=1000)]:
            await client.delete(*keys)
