"""Renders the standard library documentation with pydoc, one Markdown page per module.

Runs in a separate process, because describing a module imports it. Uses the standard library only:
``python -I module_pages.py DIRECTORY LONGEST_PAGE_CHARS``.
"""

import importlib
import pkgutil
import pydoc
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

SKIPPED_MODULES = frozenset(
    {"antigravity", "this", "idlelib", "lib2to3", "test", "tkinter", "turtle", "turtledemo", "ensurepip", "venv"}
)
"""Modules that have import side effects, open windows, or install Python."""

PACKAGES = ("asyncio", "concurrent", "email", "http", "importlib", "json", "logging", "urllib", "xml.etree")
"""Packages whose modules get their own pages."""

FIRST = ("Description", "Functions", "Classes")
"""Sections that precede the others, which are cut first."""

SKIPPED_SECTIONS = frozenset(
    {"Author", "Credits", "Data", "Date", "File", "Module docs", "Module reference", "Package contents", "Version"}
)
"""Sections without information, tables of constants, and local paths."""


def module_names() -> Iterator[str]:
    """Public modules of the standard library, including those of other platforms."""
    yield from (
        name for name in sorted(sys.stdlib_module_names) if not name.startswith("_") and name not in SKIPPED_MODULES
    )
    for package in PACKAGES:
        path = importlib.import_module(package).__path__
        yield from (found.name for found in pkgutil.iter_modules(path, f"{package}.") if "._" not in found.name)


def page(name: str, longest_chars: int) -> str:
    """The page of a module, cut between paragraphs.

    Raises:
        Exception: the module cannot be imported on this platform.
    """
    sections: dict[str, list[str]] = {"": []}
    lines = sections[""]
    rendered = pydoc.plain(pydoc.render_doc(name, title="%s"))
    for line in re.sub(" at 0x[0-9a-f]+", "", rendered).splitlines()[1:]:
        if re.fullmatch("[A-Z][A-Z ]+", line):
            lines = sections.setdefault(line.capitalize(), [])
        else:
            lines.append(re.sub(r"^ *\|  ?", "", line.removeprefix("    ")).rstrip())
    synopsis = " ".join(" ".join(sections.pop("Name", [])).split())
    titles = (*FIRST, *(title for title in sections if title and title not in (*FIRST, *SKIPPED_SECTIONS)))
    texts = {title: "\n".join(sections.get(title, [])).strip("\n") for title in titles}
    parts = [f"# {synopsis or name}", *(f"## {title}\n\n{text}" for title, text in texts.items() if text)]
    whole = "\n\n".join(parts)
    if len(whole) <= longest_chars:
        return f"{whole}\n"
    cut = whole[:longest_chars]
    return f"{cut[: cut.rfind(chr(10) * 2)]}\n"


def main() -> None:
    """Write all pages that can be rendered."""
    target, longest_chars = Path(sys.argv[1]), int(sys.argv[2])
    warnings.simplefilter("ignore")
    for name in module_names():
        try:
            text = page(name, longest_chars)
        except (Exception, SystemExit):  # noqa: BLE001 - whatever a module of another platform may do
            text = ""
        if text:
            (target / f"{name}.md").write_text(text, "utf-8", "replace")


if __name__ == "__main__":
    main()
