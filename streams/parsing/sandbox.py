"""Parsing at arm's length: limited child processes, each replaced when a document kills it."""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from typing import Any, Final

import orjson

from infra.settings import ParseSettings
from schemas.charsets import declared_charset
from streams.parsing.charsets import CharsetMismatch, unicode_text
from streams.parsing.parse import ParsedDocument, ParseFailed, is_plain, media_type_of, parse
from streams.parsing.wire import LENGTH

__all__ = ["ParseFailed", "ParserPool"]

_PLAIN_BYTES: Final = 1_000_000
"""Plain text up to this size is read in the worker: no third-party parser is involved, and a hop to a child would cost
every edit of a page a millisecond. A page of 10 kB takes 0.1 ms this way, 1 MB some 10 ms."""

_NO_THREAD_MEMORY: Final = 127
"""How glibc ends a process that has no memory left for a library's thread-local data; it cannot raise MemoryError."""

_BYTES_PER_CHAR: Final = 12
"""Most bytes that a character of JSON takes: an escaped surrogate pair."""

_DOCUMENTS_PER_CHILD: Final = 1_000
"""Parsers leak; a child's address space is limited over its whole life, so that life is bounded."""

_ENDING_S: Final = 5.0
"""Longest a process takes to end after its pipe has closed; freeing gigabytes is not instant."""


class _Child:
    """A parser process, how many documents it has read, and the exchange with it."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.documents = 0

    @property
    def usable(self) -> bool:
        return self.process.returncode is None and self.documents < _DOCUMENTS_PER_CHILD

    async def ask(self, head: bytes, content: bytes, max_bytes: int) -> dict[str, Any]:
        """Send a document and return the answer.

        Raises:
            EOFError: the process ended without one.
            ConnectionError: it ended before it had read the document.
        """
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("a parser process was started without pipes")
        self.documents += 1
        self.process.stdin.write(LENGTH.pack(len(head)) + head + LENGTH.pack(len(content)))
        self.process.stdin.write(content)
        await self.process.stdin.drain()
        (length,) = LENGTH.unpack(await self.process.stdout.readexactly(LENGTH.size))
        if length > max_bytes:
            raise ParseFailed("too-large", "its text is longer than a document may have")
        answer: dict[str, Any] = orjson.loads(await self.process.stdout.readexactly(length))
        return answer

    async def exit_code(self) -> int:
        """How it ended, now that its pipe has; a process that only closed its pipe is ended."""
        # Not killed at once: asyncio's kill() may reap a process that is just ending, and its code is lost.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ENDING_S):
                return await self.process.wait()
        self.kill()
        return await self.process.wait()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()


class ParserPool:
    """Parses documents in ``settings.processes`` children; use ``start`` and ``close``."""

    def __init__(self, settings: ParseSettings) -> None:
        self._settings = settings
        self._idle: asyncio.Queue[_Child | None] = asyncio.Queue()
        self._children: set[_Child] = set()
        self._closed = False

    async def start(self) -> None:
        """Start the children, so that the first document does not wait for one."""
        for _ in range(self._settings.processes):
            self._idle.put_nowait(await self._spawn())

    async def close(self) -> None:
        """End the children; what is being parsed is not parsed."""
        self._closed = True
        for child in self._children:
            child.kill()
        for child in list(self._children):
            await child.process.wait()

    async def parse(self, content: bytes, content_type: str | None, file_name: str | None) -> ParsedDocument:
        """What a document says. Cancelling it ends the child that reads the document.

        Raises:
            ParseFailed: see there.
            RuntimeError: the pool was closed meanwhile; that says nothing about the document.
        """
        if len(content) > self._settings.max_bytes:
            raise ParseFailed("too-large", f"it has {len(content)} bytes, the limit is {self._settings.max_bytes}")
        media_type = media_type_of(content, content_type, file_name)
        charset = declared_charset(content_type)
        # Detecting an unknown encoding takes a second at worst, so that is the child's work too.
        if is_plain(media_type) and len(content) <= _PLAIN_BYTES and not _needs_detection(content, charset):
            return self._bounded(parse(content, media_type, charset))
        head = orjson.dumps({"media_type": media_type, "charset": charset})
        try:
            answer = await self._ask(head, content)
        except _Killed:
            answer = await self._ask(head, content)
        if "kind" in answer:
            raise ParseFailed(answer["kind"], answer["message"])
        metadata = {name: tuple(one) if isinstance(one, list) else one for name, one in answer["metadata"].items()}
        return self._bounded(ParsedDocument(answer["text"], answer["title"], media_type, metadata))

    def _bounded(self, parsed: ParsedDocument) -> ParsedDocument:
        if len(parsed.text) > self._settings.max_text_chars:
            limit = self._settings.max_text_chars
            raise ParseFailed("too-large", f"its text has {len(parsed.text)} characters, the limit is {limit}")
        return parsed

    async def _ask(self, head: bytes, content: bytes) -> dict[str, Any]:
        settings = self._settings
        child = await self._idle.get()
        answer: dict[str, Any] | None = None
        try:
            if child is None or not child.usable:
                self._discard(child)
                child = await self._spawn()
            async with asyncio.timeout(settings.wall_s):
                answer = await child.ask(head, content, settings.max_text_chars * _BYTES_PER_CHAR)
        except TimeoutError:
            raise ParseFailed("time", f"reading it took more than {settings.wall_s:g} s") from None
        except (EOFError, ConnectionError):  # IncompleteReadError is an EOFError
            if child is None or self._closed:
                raise RuntimeError("the parser pool was closed") from None
            raise _death(await child.exit_code(), settings) from None
        finally:
            # No await in here: a second cancellation must not lose the place in the pool. A child whose answer was not
            # awaited would give it to the next document; one that ran out of memory has little left.
            if answer is None or answer.get("kind") == "memory":
                self._discard(child)
                child = None
            self._idle.put_nowait(child)
        return answer

    async def _spawn(self) -> _Child:
        settings = self._settings
        limits = [str(settings.memory_bytes), str(settings.cpu_s), str(settings.max_text_chars)]
        # Nothing else of the environment: a document that takes over the child finds no credentials there.
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "LANG": "C.UTF-8", "PATH": os.defpath}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "streams.parsing.child", str(os.getpid()), *limits,
            stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment,
        )  # fmt: skip
        child = _Child(process)
        self._children.add(child)
        if self._closed:
            child.kill()
        return child

    def _discard(self, child: _Child | None) -> None:
        if child is not None:
            self._children.discard(child)
            child.kill()


def _needs_detection(content: bytes, charset: str | None) -> bool:
    try:
        return unicode_text(content, charset) is None
    except CharsetMismatch:
        return False


class _Killed(ParseFailed):
    """Somebody else ended the child, perhaps before it saw the document: blaming that takes a second time."""


def _death(code: int, settings: ParseSettings) -> ParseFailed:
    if code == -signal.SIGKILL:
        return _Killed("crashed", "its parser was killed twice; by the system, if memory is short")
    if code == _NO_THREAD_MEMORY:
        return ParseFailed("memory", "reading it takes more memory than a document may use")
    if code == -signal.SIGXCPU:
        return ParseFailed("time", f"reading it took more than {settings.cpu_s:g} s of processor time")
    return ParseFailed("crashed", f"its parser ended with code {code}")
