"""Documents of the demo: the Python standard library documentation as rendered by pydoc, or the user's own."""

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
"""Limits embedding of the few hundred documents to well under a minute."""

_FORMAT: Final = 2
"""Increment when the rendered pages change."""

_TIMEOUT_S: Final = 120.0
_EDITABLE: Final = {".md": "text/markdown", ".txt": "text/plain"}
_MAX_EDITABLE_CHARS: Final = 200_000


class CorpusUnavailable(Exception):
    """The pages could not be rendered."""


@dataclass(frozen=True, slots=True)
class Sources:
    """The user's own documents: at most one of these."""

    docs: Path | None = None
    git: Path | None = None
    events: Path | None = None

    @property
    def own(self) -> bool:
        """Whether the user provided documents."""
        return any((self.docs, self.git, self.events))


@dataclass(frozen=True, slots=True)
class Text:
    """A document with its text."""

    document_id: str
    content: str

    @property
    def content_type(self) -> str:
        """Media type."""
        return _EDITABLE[PurePosixPath(self.document_id).suffix.lower()]

    @property
    def name(self) -> str:
        """Display name."""
        return PurePosixPath(self.document_id).stem.replace("_", " ").replace("-", " ")


def standard_library_pages() -> Path:
    """A directory with a Markdown page per module, rendered once for each Python version.

    Raises:
        CorpusUnavailable: pydoc failed. The message contains the reason.
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
        except OSError:  # rendered by a concurrent demo
            if not pages.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return pages


def editable(sources: Sources, pages: Path | None) -> Text:
    """A text document of the corpus, or one of the demo's own if there is none.

    Args:
        sources: documents of the user.
        pages: the ingested directory, if any.
    """
    if not sources.own and pages is not None:
        # A short page: typical edits are small.
        return Text("sched.md", (pages / "sched.md").read_text("utf-8"))
    for text in _texts(sources):
        if 0 < len(text.content) <= _MAX_EDITABLE_CHARS:
            return text
    return Text("freshline-demo/notice.md", "# Notice board\n\nA notice of the Freshline demo.\n")


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
    # -I: ignore modules of the user's directory and environment.
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
        raise CorpusUnavailable(
            f"pydoc took more than {_TIMEOUT_S:.0f} s: use --docs DIR for documents of your own"
        ) from None
    if made.returncode != 0 or not any(target.iterdir()):
        raise CorpusUnavailable(f"pydoc failed: {made.stderr.strip()[-300:]}; use --docs DIR for documents of your own")
    target.chmod(0o755)
