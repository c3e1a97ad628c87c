"""What a bad document costs: itself, and one child at most."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from infra.settings import ParseSettings
from streams.parsing import sandbox
from streams.parsing.sandbox import ParseFailed, ParserPool

PAGE = b"<html><head><title>Pay</title></head><body><h1>Pay</h1><p>Ask."
ENDLESS = b"<p>" + b"<i>word</i> " * 400_000
"""Takes some ten seconds to read."""


@pytest.fixture
async def pool_with() -> AsyncIterator[Callable[..., ParserPool]]:
    pools = []

    async def start(**limits: object) -> ParserPool:
        pool = ParserPool(ParseSettings.model_validate(limits))
        pools.append(pool)
        await pool.start()
        return pool

    yield start
    for pool in pools:
        await pool.close()
    assert parsers_of(os.getpid()) == []


def parsers_of(parent: int) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        try:
            if "streams.parsing.child" in process.cmdline():
                found.append(process)
        except psutil.Error:  # ended since it was listed
            continue
    return found


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - other processes send no notification
            await asyncio.sleep(0.01)


async def assert_works(pool: ParserPool) -> None:
    parsed = await pool.parse(PAGE, "text/html", None)
    assert (parsed.title, parsed.text) == ("Pay", "# Pay\n\nAsk.")


async def failure(pool: ParserPool, content: bytes = ENDLESS, content_type: str = "text/html") -> str:
    with pytest.raises(ParseFailed) as failed:
        await pool.parse(content, content_type, None)
    return failed.value.kind


async def test_documents_are_read_by_a_child(pool_with):
    pool = await pool_with()
    for _ in range(3):
        await assert_works(pool)
    assert len(parsers_of(os.getpid())) == 1


async def test_pages_of_text_need_no_child():
    pool = ParserPool(ParseSettings())
    parsed = await pool.parse(b"---\ntitle: Pay\n---\nAsk.", "text/markdown; charset=utf-8", "pay.md")
    assert (parsed.title, parsed.text, parsed.media_type) == ("Pay", "Ask.", "text/markdown")
    assert parsers_of(os.getpid()) == []


async def test_text_in_an_unknown_or_a_named_encoding(pool_with):
    pool = await pool_with()
    assert "Zürich" in (await pool.parse("Zürich ist schön. ".encode("latin-1") * 9, "text/plain", None)).text
    assert (await pool.parse("Łódź".encode("iso-8859-2"), 'text/plain; charset="iso-8859-2"', None)).text == "Łódź"


async def test_a_page_of_text_takes_no_time():
    pool = ParserPool(ParseSettings())
    page = b"# Pay\n\n" + b"Ask your lead. " * 670
    took = []
    for _ in range(50):
        began = time.process_time()  # other processes do not count
        await pool.parse(page, "text/markdown", None)
        took.append(time.process_time() - began)
    assert sorted(took)[25] < 0.003


async def test_failures_of_documents_cost_no_child(pool_with):
    pool = await pool_with()
    await assert_works(pool)
    (before,) = parsers_of(os.getpid())
    assert await failure(pool, b"no zip", "application/epub+zip") == "broken"
    assert await failure(pool, b"x", "application/zip") == "unsupported"
    await assert_works(pool)
    assert parsers_of(os.getpid()) == [before]


async def test_processor_time_is_limited(pool_with):
    pool = await pool_with(cpu_s=0.1)
    assert await failure(pool) == "time"
    await assert_works(pool)


async def test_time_is_limited(pool_with):
    pool = await pool_with(timeout_s=8)
    await assert_works(pool)
    (child,) = parsers_of(os.getpid())
    child.suspend()
    assert await failure(pool, PAGE) == "time"
    await assert_works(pool)


async def test_memory_is_limited(pool_with):
    pool = await pool_with(memory_bytes=40_000_000)
    assert await failure(pool) == "memory"
    await assert_works(pool)


async def test_sizes_are_limited(pool_with):
    pool = await pool_with(max_text_chars=20, max_bytes=1_000)
    assert await failure(pool, b"<p>" + b"word " * 9) == "too-large"
    assert await failure(pool, b"word " * 9, "text/plain") == "too-large"
    assert await failure(pool, b"x" * 1_001, "text/plain") == "too-large"
    await assert_works(pool)


async def test_a_child_that_dies_fails_its_document_only(pool_with):
    pool = await pool_with()
    await assert_works(pool)
    (child,) = parsers_of(os.getpid())
    reading = asyncio.create_task(pool.parse(ENDLESS, "text/html", None))
    idle_s = child.cpu_times().user
    await until(lambda: child.cpu_times().user > idle_s + 0.1)
    child.send_signal(signal.SIGSEGV)
    with pytest.raises(ParseFailed, match="-11") as failed:
        await reading
    assert failed.value.kind == "crashed"
    await assert_works(pool)


async def test_a_child_that_another_client_kills_costs_nothing(pool_with):
    pool = await pool_with()
    await assert_works(pool)
    parsers_of(os.getpid())[0].kill()
    await assert_works(pool)
    # Not even while it reads: the document is read again.
    (child,) = parsers_of(os.getpid())
    reading = asyncio.create_task(pool.parse(PAGE + b"<i>word</i> " * 20_000, "text/html", None))
    idle_s = child.cpu_times().user
    await until(lambda: child.cpu_times().user > idle_s + 0.05)
    child.kill()
    assert (await reading).title == "Pay"


async def test_a_document_whose_child_is_killed_each_time_fails(pool_with):
    pool = await pool_with()
    killed = set()
    reading = asyncio.create_task(pool.parse(ENDLESS, "text/html", None))

    def kill_next() -> bool:
        for child in parsers_of(os.getpid()):
            child.kill()
            killed.add(child.pid)
        return reading.done()

    await until(kill_next)
    with pytest.raises(ParseFailed, match="killed twice"):
        await reading
    assert len(killed) == 2
    await assert_works(pool)


async def test_cancelling_ends_the_child_and_keeps_the_place(pool_with):
    pool = await pool_with()
    for _ in range(3):
        await assert_works(pool)
        (child,) = parsers_of(os.getpid())
        reading = asyncio.create_task(pool.parse(ENDLESS, "text/html", None))
        idle_s = child.cpu_times().user
        await until(lambda child=child, idle_s=idle_s: child.cpu_times().user > idle_s + 0.05)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await until(lambda child=child: not child.is_running())
    await assert_works(pool)


async def test_many_at_once_share_the_children(pool_with):
    pool = await pool_with(processes=2)
    pages = await asyncio.gather(*(pool.parse(f"<p>page {n}".encode(), "text/html", None) for n in range(40)))
    assert [page.text for page in pages] == [f"page {n}" for n in range(40)]
    assert len(parsers_of(os.getpid())) == 2


async def test_closing_blames_no_document(pool_with):
    pool = await pool_with()
    await assert_works(pool)
    reading = asyncio.create_task(pool.parse(ENDLESS, "text/html", None))
    await asyncio.sleep(0)
    await pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        await reading
    assert parsers_of(os.getpid()) == []


async def test_a_child_is_replaced_after_its_share_of_documents(pool_with, monkeypatch):
    monkeypatch.setattr(sandbox, "_DOCUMENTS_PER_CHILD", 2)
    pool = await pool_with()
    pids = []
    for _ in range(4):
        await assert_works(pool)
        pids += [process.pid for process in parsers_of(os.getpid()) if process.is_running()][-1:]
    assert len(set(pids)) == 2


async def test_a_child_sees_no_secrets_and_writes_no_files(pool_with, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    pool = await pool_with()
    await assert_works(pool)
    (child,) = parsers_of(os.getpid())
    assert set(child.environ()) == {"PYTHONPATH", "LANG", "PATH"}
    assert child.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
    assert child.rlimit(psutil.RLIMIT_CORE) == (0, 0)


async def test_children_die_with_their_worker():
    code = (
        "import asyncio\n"
        "from infra.settings import ParseSettings\n"
        "from streams.parsing.sandbox import ParserPool\n"
        "async def main():\n"
        "    pool = ParserPool(ParseSettings())\n"
        "    await pool.start()\n"
        f"    await pool.parse({PAGE!r}, 'text/html', None)\n"
        "    print('ready', flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    root = Path(__file__).parents[2]
    worker = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, cwd=root)
    assert await worker.stdout.readline() == b"ready\n"
    (child,) = parsers_of(worker.pid)
    worker.kill()
    await worker.wait()
    await until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
