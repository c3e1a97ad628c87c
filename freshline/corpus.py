"""The documents of the demo: the running Python's standard library, as pydoc describes it."""

import subprocess
import sys
from pathlib import Path
from typing import Final

_MAX_CHARS: Final = 6_000
"""Long pages are cut: a few hundred documents are to be embedded in well under a minute."""

_TIMEOUT_S: Final = 120.0

# Runs in a process of its own: importing two hundred modules is nothing to do to one's own process.
_WRITE_PAGES: Final = """
import importlib, io, pkgutil, pydoc, re, sys, warnings
from pathlib import Path

target, limit = Path(sys.argv[1]), int(sys.argv[2])
warnings.simplefilter("ignore")
passed_over = {"antigravity", "this", "idlelib", "lib2to3", "test", "tkinter", "turtle", "turtledemo"}
names = [name for name in sorted(sys.stdlib_module_names) if not name.startswith("_") and name not in passed_over]
for package in ("asyncio", "concurrent", "email", "http", "importlib", "json", "logging", "urllib", "xml.etree"):
    found = pkgutil.iter_modules(importlib.import_module(package).__path__, package + ".")
    names += [one.name for one in found if "._" not in one.name and not one.name.endswith("__main__")]
for name in names:
    try:
        page = pydoc.plain(pydoc.render_doc(name, title="%s", renderer=pydoc.plaintext))
    except BaseException:
        continue  # a module of another platform
    lines = ["# " + name, ""]
    for line in page.splitlines()[1:]:
        lines.append("## " + line.capitalize() if re.fullmatch("[A-Z][A-Z ]+", line) else line.removeprefix("    "))
    (target / (name + ".md")).write_text("\\n".join(lines)[:limit], "utf-8", "replace")
"""


class NoCorpus(Exception):
    """The pages could not be made."""


def standard_library_pages(directory: Path) -> Path:
    """Write one Markdown page for each module; made once for each version of Python.

    Raises:
        NoCorpus: pydoc failed; the message tells how.
    """
    pages = directory / f"python-{sys.version_info.major}.{sys.version_info.minor}"
    if pages.is_dir():
        return pages
    partial = pages.with_suffix(".partial")
    partial.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", _WRITE_PAGES, str(partial), str(_MAX_CHARS)]
    try:
        made = subprocess.run(  # noqa: S603 - our own program
            command, check=False, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise NoCorpus(f"pydoc took more than {_TIMEOUT_S:.0f} s: use --docs DIR for documents of your own") from None
    if made.returncode != 0 or not any(partial.iterdir()):
        raise NoCorpus(f"pydoc failed: {made.stderr.strip()[-300:]}; use --docs DIR for documents of your own")
    partial.rename(pages)
    return pages
