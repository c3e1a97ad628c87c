"""The documents of the demo: the running Python's standard library as pydoc describes it, or what the user brought."""

import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from freshline.demo import module_pages
from infra.local.fetch import cache_dir
from ingest.connectors.event_file import read_events
from ingest.connectors.files import Unreadable, list_folder, read

_LONGEST_PAGE_CHARS: Final = 5_000
"""A few hundred documents are to be embedded in well under a minute."""

_FORMAT: Final = 2
"""To be raised whenever pages come out differently."""

_TIMEOUT_S: Final = 120.0
_EDITABLE: Final = {".md": "text/markdown", ".txt": "text/plain"}
_MAX_EDITABLE_CHARS: Final = 200_000


class NoCorpus(Exception):
    """The pages could not be made."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Documents that the user brought: one of these, or none."""

    docs: Path | None = None
    git: Path | None = None
    events: Path | None = None

    @property
    def own(self) -> bool:
        """True if the user brought documents."""
        return any((self.docs, self.git, self.events))


@dataclass(frozen=True, slots=True)
class Text:
    """A document whose text is at hand."""

    document_id: str
    content: str

    @property
    def content_type(self) -> str:
        """Media type."""
        return _EDITABLE[PurePosixPath(self.document_id).suffix.lower()]

    @property
    def name(self) -> str:
        """What people would call it."""
        return PurePosixPath(self.document_id).stem.replace("_", " ").replace("-", " ")


def standard_library_pages() -> Path:
    """A folder with a Markdown page for each module; made once for each version of Python.

    Raises:
        NoCorpus: pydoc failed; the message tells how.
    """
    cache = cache_dir()
    pages = cache / f"pydoc-{platform.python_version()}-{_FORMAT}"
    if pages.is_dir():
        return pages
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="pydoc-", dir=cache))
    try:
        _write_pages(partial)
        try:
            partial.rename(pages)
        except OSError:  # another demo was faster
            if not pages.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return pages


def editable(sources: Sources, pages: Path | None) -> Text:
    """A document of the corpus that is text; one of the demo's own where there is none.

    Args:
        sources: what the user brought.
        pages: the folder that is ingested, if one is.
    """
    if not sources.own and pages is not None:
        # A short page, so that an edit of it is as small as edits are.
        return Text("sched.md", (pages / "sched.md").read_text("utf-8"))
    for text in _texts(sources):
        if 0 < len(text.content) <= _MAX_EDITABLE_CHARS:
            return text
    return Text("freshline-demo/notice.md", "# Notice board\n\nWhat this demo has to say.\n")


def _texts(sources: Sources) -> Iterator[Text]:
    if sources.docs is not None:
        yield from _in_folder(sources.docs.resolve())
    if sources.git is not None:
        yield from _in_repository(sources.git)
    if sources.events is not None:
        yield from _in_history(sources.events)


def _in_folder(root: Path) -> Iterator[Text]:
    for name, file in list_folder(root, root).files.items():
        if _is_text(name):
            with suppress(Unreadable):
                yield Text(name, read(file).decode("utf-8", "replace"))


def _in_repository(repository: Path) -> Iterator[Text]:
    for name in _git(repository, "ls-tree", "-r", "-z", "--name-only", "--full-tree", "HEAD").split("\0"):
        if _is_text(name):
            yield Text(name, _git(repository, "show", f"HEAD:{name}"))


def _in_history(events: Path) -> Iterator[Text]:
    contents: dict[str, str | None] = {}
    for event in read_events(events):
        keeps = event.type == "renamed" and event.new_content() is None
        contents[event.doc_id] = contents.get(event.doc_id) if keeps else event.content
    yield from (Text(name, content) for name, content in contents.items() if content is not None and _is_text(name))


def _is_text(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in _EDITABLE


def _git(repository: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, check=True, capture_output=True).stdout.decode("utf-8", "replace")  # noqa: S603 - git


def _write_pages(target: Path) -> None:
    # -I: modules of the user's directory or environment are not the standard library's.
    command = [sys.executable, "-I", module_pages.__file__, str(target), str(_LONGEST_PAGE_CHARS)]
    try:
        made = subprocess.run(  # noqa: S603 - our own program
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            cwd=target,
        )
    except subprocess.TimeoutExpired:
        raise NoCorpus(f"pydoc took more than {_TIMEOUT_S:.0f} s: use --docs DIR for documents of your own") from None
    if made.returncode != 0 or not any(target.iterdir()):
        raise NoCorpus(f"pydoc failed: {made.stderr.strip()[-300:]}; use --docs DIR for documents of your own")
    target.chmod(0o755)
