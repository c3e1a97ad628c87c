"""Parsing at arm's length: limited child processes, each replaced when a document kills it."""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from typing import Final

import orjson

from infra.settings import ParseSettings
from streams.parsing.parse import ParsedDocument, ParseFailed, is_plain, media_type_of, parse
from streams.parsing.wire import LENGTH

__all__ = ["ParseFailed", "ParserPool"]

_PLAIN_BYTES: Final = 1_000_000
"""Plain text up to this size is read in the worker: no third-party parser is involved, and a hop to a child would cost
every edit of a page milliseconds."""

_BYTES_PER_CHAR: Final = 12
"""Most bytes that a character of JSON takes: an escaped surrogate pair."""


class ParserPool:
    """Parses documents in ``settings.processes`` children; use ``start`` and ``close``."""

    def __init__(self, settings: ParseSettings) -> None:
        self._settings = settings
        self._idle: asyncio.Queue[Process | None] = asyncio.Queue()
        self._children: set[Process] = set()

    async def start(self) -> None:
        """Start the children, so that the first document does not wait for it."""
        for _ in range(self._settings.processes):
            self._idle.put_nowait(await self._spawn())

    async def close(self) -> None:
        """End the children."""
        for child in list(self._children):
            await self._end(child)

    async def parse(self, content: bytes, content_type: str | None, file_name: str | None) -> ParsedDocument:
        """Text and title of a document.

        Raises:
            ParseFailed: see there.
        """
        if len(content) > self._settings.max_bytes:
            raise ParseFailed("too-large", f"it has {len(content)} bytes, the limit is {self._settings.max_bytes}")
        media_type = media_type_of(content, content_type, file_name)
        if is_plain(media_type) and len(content) <= _PLAIN_BYTES:
            return parse(content, media_type)
        answer = await self._ask(content, orjson.dumps({"media_type": media_type, "file_name": file_name}))
        if "kind" in answer:
            raise ParseFailed(answer["kind"], answer["message"])
        return ParsedDocument(answer["text"], answer["title"], media_type)

    async def _ask(self, content: bytes, head: bytes) -> dict[str, str]:
        child = await self._idle.get()
        healthy = False
        try:
            if child is None or child.returncode is not None:
                child = await self._spawn()
            async with asyncio.timeout(self._settings.wall_s):
                answer = await self._exchange(child, head, content)
            healthy = True
        except TimeoutError:
            raise ParseFailed("time", f"reading it took more than {self._settings.wall_s:.0f} s") from None
        except (EOFError, ConnectionError):  # IncompleteReadError is an EOFError
            raise _death(await child.wait(), self._settings) if child else AssertionError from None
        else:
            return answer
        finally:
            if not healthy and child is not None:
                # Cancelled half-way, too: its next answer would belong to this document.
                await self._end(child)
            self._idle.put_nowait(child if healthy else None)

    async def _exchange(self, child: Process, head: bytes, content: bytes) -> dict[str, str]:
        if child.stdin is None or child.stdout is None:
            raise RuntimeError("the child was started without pipes")
        child.stdin.write(LENGTH.pack(len(head)) + head + LENGTH.pack(len(content)) + content)
        await child.stdin.drain()
        (length,) = LENGTH.unpack(await child.stdout.readexactly(LENGTH.size))
        if length > self._settings.max_text_chars * _BYTES_PER_CHAR:
            raise ParseFailed("too-large", "its text is longer than a document may have")
        answer: dict[str, str] = orjson.loads(await child.stdout.readexactly(length))
        return answer

    async def _spawn(self) -> Process:
        settings = self._settings
        limits = [str(settings.memory_bytes), str(settings.cpu_s), str(settings.max_text_chars)]
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "streams.parsing.child", str(os.getpid()), *limits,
            stdin=PIPE, stdout=PIPE, stderr=DEVNULL,
        )  # fmt: skip
        self._children.add(child)
        return child

    async def _end(self, child: Process) -> None:
        self._children.discard(child)
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


def _death(code: int, settings: ParseSettings) -> ParseFailed:
    if code == -signal.SIGXCPU:
        return ParseFailed("time", f"reading it took more than {settings.cpu_s:.0f} s of processor time")
    return ParseFailed("crashed", f"its parser ended with code {code}")
