"""Display of progress on a terminal, or as lines."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from infra.local.fetch import DOWNLOADING, Say
from infra.local.state import Phase


@contextlib.contextmanager
def shown(console: Console | None = None) -> Iterator[Say]:
    """A function for ``Stack.up`` or ``models_dir`` that displays progress within the context."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description:<32}"),
        TextColumn("{task.fields[doing]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def say(subject: str, text: str) -> None:
            if subject not in tasks:
                tasks[subject] = progress.add_task(subject, total=1, doing=text)
            finished = text.startswith((Phase.READY, "done"))
            progress.update(tasks[subject], doing=text, completed=int(finished))

        yield say


class _Lines:
    """Prints a line for each change, without the progress of downloads."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._downloading: set[str] = set()

    def __call__(self, subject: str, text: str) -> None:
        if text.startswith(DOWNLOADING):
            if subject in self._downloading:
                return
            self._downloading.add(subject)
        self._console.print(f"{subject}: {text}", highlight=False, markup=False, soft_wrap=True)
