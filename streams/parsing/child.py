"""The limited process: reads one document after the other from its standard input, answers on its standard output.

A document that uses up its processor time, memory or patience costs this process, and nothing else.
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
    """Serve until the input ends or the parent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    # Answers leave by a descriptor of their own: a parser that prints must not break the protocol.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import markitdown  # noqa: F401, PLC0415 - loaded once, before memory is limited, not by the first document

    size_bytes = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: PTH123, SIM115
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes + memory_bytes, size_bytes + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    while (head := read_frame(sys.stdin.buffer)) is not None:
        content = read_frame(sys.stdin.buffer) or b""
        _allow_cpu(cpu_s)
        _answer(answers, head, content, max_text_chars)


def _allow_cpu(cpu_s: float) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    # Whole seconds are what the kernel counts in.
    limit = int(used.ru_utime + used.ru_stime + cpu_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _answer(answers: BinaryIO, head: bytes, content: bytes, max_text_chars: int) -> None:
    asked = orjson.loads(head)
    try:
        parsed = parse(content, asked["media_type"], asked["charset"])
        answer: dict[str, Any] = {"text": parsed.text, "title": parsed.title, "metadata": parsed.metadata}
        if len(parsed.text) > max_text_chars:
            told = f"its text has {len(parsed.text)} characters, the limit is {max_text_chars}"
            answer = {"kind": "too-large", "message": told}
    except ParseFailed as failure:
        answer = {"kind": failure.kind, "message": _short(str(failure))}
    except MemoryError:
        answer = {"kind": "memory", "message": "reading it takes more memory than a document may use"}
    except Exception as error:  # noqa: BLE001 - parsers fail in every way there is; all of them mean a broken document
        answer = {"kind": "broken", "message": _short(f"{type(error).__name__}: {error}")}
    write_frame(answers, orjson.dumps(answer))


def _short(message: str) -> str:
    """What a record header and a log line can take, whatever bytes of the document a parser quotes."""
    return message.encode("utf-8", "replace").decode("utf-8")[:500]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
