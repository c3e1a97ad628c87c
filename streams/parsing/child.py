"""The sandbox process: reads documents from standard input, one after the other, and writes results to standard output.

A document that exceeds the limits of CPU time, memory or duration affects only this process.
"""

import ctypes
import os
import resource
import signal
import sys
from typing import Any, BinaryIO, Final

import orjson

from streams.parsing.parse import ParseFailed, parse
from streams.parsing.wire import read_frame, write_frame

_PR_SET_PDEATHSIG: Final = 1


def main(parent: int, memory_bytes: int, cpu_s: float, max_text_chars: int) -> None:
    """Serve until the input ends or the parent exits."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    # Results use a separate descriptor: a parser that prints must not break the protocol.
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import markitdown  # noqa: F401, PLC0415 - loaded before memory is limited, not by the first document

    size_bytes = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: PTH123, SIM115
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes + memory_bytes, size_bytes + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    while (head := read_frame(sys.stdin.buffer)) is not None:
        content = read_frame(sys.stdin.buffer) or b""
        _allow_cpu(cpu_s)
        _respond(results, head, content, max_text_chars)


def _allow_cpu(cpu_s: float) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    # The kernel counts whole seconds.
    limit = int(used.ru_utime + used.ru_stime + cpu_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _respond(results: BinaryIO, head: bytes, content: bytes, max_text_chars: int) -> None:
    request = orjson.loads(head)
    try:
        parsed = parse(content, request["media_type"], request["charset"])
        result: dict[str, Any] = {"text": parsed.text, "title": parsed.title, "metadata": parsed.metadata}
        if len(parsed.text) > max_text_chars:
            message = f"the text has {len(parsed.text)} characters, the limit is {max_text_chars}"
            result = {"kind": "too-large", "message": message}
    except ParseFailed as failure:
        result = {"kind": failure.kind, "message": _short(str(failure))}
    except MemoryError:
        result = {"kind": "memory", "message": "parsing exceeded the memory limit"}
    except Exception as error:  # noqa: BLE001 - parsers raise errors of any type; all mean a broken document
        result = {"kind": "broken", "message": _short(f"{type(error).__name__}: {error}")}
    write_frame(results, orjson.dumps(result))


def _short(message: str) -> str:
    """Make a message fit a record header and a log line, whatever bytes of the document it quotes."""
    return message.encode("utf-8", "replace").decode("utf-8")[:500]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
