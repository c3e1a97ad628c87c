"""Parses in resource-limited child processes. A process that a document kills is replaced."""

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
"""Largest plain text that is decoded in the worker: no third-party parser is involved, and a child process would cost
every edit a millisecond. Decoding takes 0.1 ms for 10 kB and about 10 ms for 1 MB."""

_NO_THREAD_MEMORY: Final = 127
"""Exit code of glibc when no memory is left for a library's thread-local data, instead of a MemoryError."""

_BYTES_PER_CHAR: Final = 12
"""Maximum number of bytes of a character in JSON: an escaped surrogate pair."""

_DOCUMENTS_PER_CHILD: Final = 1_000
"""Documents that a child parses before it is replaced. Parsers leak memory, and the limit applies to the child's
lifetime."""

_EXIT_S: Final = 5.0
"""Maximum time for a process to exit after its pipe has closed. Freeing gigabytes takes time."""


class _Child:
    """A parser process, with the number of its documents."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.documents = 0

    @property
    def usable(self) -> bool:
        return self.process.returncode is None and self.documents < _DOCUMENTS_PER_CHILD

    async def parse(self, head: bytes, content: bytes, max_bytes: int) -> dict[str, Any]:
        """Send a document and return the result.

        Raises:
            EOFError: the process exited without a result.
            ConnectionError: it exited before it had read the document.
        """
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("a parser process was started without pipes")
        self.documents += 1
        self.process.stdin.write(LENGTH.pack(len(head)) + head + LENGTH.pack(len(content)))
        self.process.stdin.write(content)
        await self.process.stdin.drain()
        (length,) = LENGTH.unpack(await self.process.stdout.readexactly(LENGTH.size))
        if length > max_bytes:
            raise ParseFailed("too-large", "the text exceeds the length limit")
        result: dict[str, Any] = orjson.loads(await self.process.stdout.readexactly(length))
        return result

    async def exit_code(self) -> int:
        """Exit code, after the pipe has closed. A process that only closed its pipe is killed."""
        # Not killed immediately: asyncio's kill() can reap a process that is just exiting, and its exit code would be
        # lost.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EXIT_S):
                return await self.process.wait()
        self.kill()
        return await self.process.wait()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()


class ParserPool:
    """Parses documents in ``settings.processes`` child processes. Call ``start`` first and ``close`` last."""

    def __init__(self, settings: ParseSettings) -> None:
        self._settings = settings
        self._idle: asyncio.Queue[_Child | None] = asyncio.Queue()
        self._children: set[_Child] = set()
        self._closed = False

    async def start(self) -> None:
        """Start the child processes, so that the first document does not wait for one."""
        for _ in range(self._settings.processes):
            self._idle.put_nowait(await self._spawn())

    async def close(self) -> None:
        """Kill the child processes. Pending documents fail."""
        self._closed = True
        for child in self._children:
            child.kill()
        for child in list(self._children):
            await child.process.wait()

    async def parse(self, content: bytes, content_type: str | None, file_name: str | None) -> ParsedDocument:
        """Parse a document. Cancellation kills the child process that parses it.

        Raises:
            ParseFailed: the content cannot be read.
            RuntimeError: the pool was closed in the meantime, which is independent of the document.
        """
        if len(content) > self._settings.max_bytes:
            raise ParseFailed(
                "too-large", f"the document has {len(content)} bytes, the limit is {self._settings.max_bytes}"
            )
        media_type = media_type_of(content, content_type, file_name)
        charset = declared_charset(content_type)
        # Detection of an unknown encoding can take a second, so it runs in the child as well.
        if is_plain(media_type) and len(content) <= _PLAIN_BYTES and not _needs_detection(content, charset):
            return self._check_length(parse(content, media_type, charset))
        head = orjson.dumps({"media_type": media_type, "charset": charset})
        try:
            result = await self._parse_in_child(head, content)
        except _Killed:
            result = await self._parse_in_child(head, content)
        if "kind" in result:
            raise ParseFailed(result["kind"], result["message"])
        metadata = {name: tuple(one) if isinstance(one, list) else one for name, one in result["metadata"].items()}
        return self._check_length(ParsedDocument(result["text"], result["title"], media_type, metadata))

    def _check_length(self, parsed: ParsedDocument) -> ParsedDocument:
        if len(parsed.text) > self._settings.max_text_chars:
            limit = self._settings.max_text_chars
            raise ParseFailed("too-large", f"the text has {len(parsed.text)} characters, the limit is {limit}")
        return parsed

    async def _parse_in_child(self, head: bytes, content: bytes) -> dict[str, Any]:
        settings = self._settings
        child = await self._idle.get()
        result: dict[str, Any] | None = None
        try:
            if child is None or not child.usable:
                self._discard(child)
                child = await self._spawn()
            async with asyncio.timeout(settings.timeout_s):
                result = await child.parse(head, content, settings.max_text_chars * _BYTES_PER_CHAR)
        except TimeoutError:
            raise ParseFailed("time", f"parsing took more than {settings.timeout_s:g} s") from None
        except (EOFError, ConnectionError):  # IncompleteReadError is an EOFError
            if child is None or self._closed:
                raise RuntimeError("the parser pool was closed") from None
            raise _exit_error(await child.exit_code(), settings) from None
        finally:
            # No await here: a second cancellation must not lose the slot in the pool. A child with an unread result
            # would return it for the next document; one that ran out of memory has little left.
            if result is None or result.get("kind") == "memory":
                self._discard(child)
                child = None
            self._idle.put_nowait(child)
        return result

    async def _spawn(self) -> _Child:
        settings = self._settings
        limits = [str(settings.memory_bytes), str(settings.cpu_s), str(settings.max_text_chars)]
        # A minimal environment: a document that takes control of the child finds no credentials there.
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
    """The child was killed from outside, perhaps before it read the document.

    Only a second kill is attributed to the document.
    """


def _exit_error(code: int, settings: ParseSettings) -> ParseFailed:
    if code == -signal.SIGKILL:
        return _Killed("crashed", "the parser was killed twice, by the system if memory is short")
    if code == _NO_THREAD_MEMORY:
        return ParseFailed("memory", "parsing exceeded the memory limit")
    if code == -signal.SIGXCPU:
        return ParseFailed("time", f"parsing took more than {settings.cpu_s:g} s of CPU time")
    return ParseFailed("crashed", f"the parser exited with code {code}")
