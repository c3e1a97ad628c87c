"""Listing and reading of the documents in a folder.

Unreadable files are reported and count as present: a document counts as deleted only if a complete listing of its
folder lacks it. Only regular files are opened: opening a pipe or device could block or have side effects.
"""

import hashlib
import os
import stat
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Final

from ingest.core.content import why_unsupported

LARGEST_BYTES: Final = 100_000_000
"""Larger files are not read into memory. The limit of the service is usually lower."""

_READS: Final = 3
"""Attempts to read a file that is being written."""

_KINDS: Final = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class Unreadable(Exception):
    """The content of a file cannot be sent; the message has the reason."""


@dataclass(slots=True)
class Listing:
    """Contents of a folder.

    Attributes:
        files: name relative to the root → path of every document, sorted by name, readable or not.
        ignored_files: printable name → why the file is not a document. Hidden files are not included.
        problems: printable name → why the folder could not be listed.
        unlisted: names of folders that could not be listed. Documents in them may still exist.
    """

    files: dict[str, Path] = field(default_factory=dict)
    ignored_files: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    unlisted: set[str] = field(default_factory=set)

    def may_hold(self, name: str) -> bool:
        """Whether the document exists, or is below a folder that could not be listed."""
        parents = (parent.as_posix() for parent in PurePosixPath(name).parents)
        return name in self.files or not self.unlisted.isdisjoint((name, *parents))


def list_folder(root: Path, path: Path) -> Listing:
    """List the documents at or below ``path``, which is ``root`` or below it. Both are resolved paths.

    Symbolic links to folders are not followed; hidden files and folders are ignored.

    Raises:
        OSError: the root itself cannot be listed.
    """
    listing = Listing()
    name = path.relative_to(root).as_posix()
    if path == root:
        _list_into(listing, root, root)
    elif not _is_hidden(name) and os.path.realpath(path.parent) == str(path.parent):
        _list_path(listing, root, path, name)
    listing.files = dict(sorted(listing.files.items()))
    return listing


def sha256_of(path: Path) -> str:
    """SHA-256 of the file's content.

    Raises:
        Unreadable: it cannot be read.
    """
    try:
        with _open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(error) from error


def read(path: Path) -> bytes:
    """Read a consistent snapshot of the file's content.

    Raises:
        Unreadable: it cannot be read, or changed during each attempt.
    """
    try:
        for _ in range(_READS):
            with _open_regular(path) as file:
                before = os.fstat(file.fileno())
                content = file.read(LARGEST_BYTES + 1)
                after = os.fstat(file.fileno())
            same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
            if same and len(content) == after.st_size:
                return content
    except OSError as error:
        raise _unreadable(error) from error
    raise Unreadable("changed while it was read; the next run retries")


def shown(name: str) -> str:
    """Printable form of a file name: bytes that are not UTF-8 are escaped."""
    return os.fsencode(name).decode(errors="backslashreplace")


def why_no_document(name: str) -> str | None:
    """Reason why a file of this name is not a document; None if it is one."""
    # Names that are not UTF-8 decode to lone surrogates, which a document id cannot contain.
    if any("\ud800" <= char <= "\udfff" for char in name):
        return "its name is not UTF-8: rename it"
    return why_unsupported(name)


def _list_path(listing: Listing, root: Path, path: Path, name: str) -> None:
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        # Counts as deleted only if the root still exists.
        os.close(os.open(root, os.O_RDONLY | os.O_DIRECTORY))
    except OSError as error:
        _add_unlisted(listing, name, error)
    else:
        if stat.S_ISDIR(status.st_mode):
            _list_into(listing, root, path)
        else:
            _add_file(listing, root, path, name)


def _add_unlisted(listing: Listing, name: str, error: OSError) -> None:
    listing.unlisted.add(name)
    # A folder that disappeared meanwhile is not an error. The next listing reports its documents as deleted.
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        listing.problems[f"{shown(name)}/"] = f"cannot be listed: {error.strerror}; its documents are kept"


def _list_into(listing: Listing, root: Path, top: Path) -> None:
    folders = [top]
    while folders:
        folder = folders.pop()
        name = folder.relative_to(root).as_posix()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    path = folder / entry.name
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(path)
                    else:
                        _add_file(listing, root, path, path.relative_to(root).as_posix())
        except OSError as error:
            if folder == root:
                raise
            _add_unlisted(listing, name, error)


def _add_file(listing: Listing, root: Path, path: Path, name: str) -> None:
    reason = why_no_document(name)
    if reason is None and not Path(os.path.realpath(path)).is_relative_to(root):
        reason = "it is a link to a target outside the folder"
    if reason is None:
        listing.files[name] = path
    else:
        listing.ignored_files[shown(name)] = reason


def _open_regular(path: Path) -> BufferedReader:
    """Open a regular file. Other kinds are not opened: that could block or have side effects."""
    _check_regular(path.stat())
    # It may have been replaced since: O_NONBLOCK opens a pipe without waiting for a writer.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        _check_regular(os.fstat(file.fileno()))
    except Unreadable:
        file.close()
        raise
    return file


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable(f"is {_KINDS.get(stat.S_IFMT(status.st_mode), 'no file')}, not a regular file")
    if status.st_size > LARGEST_BYTES:
        raise Unreadable(f"larger than {LARGEST_BYTES:,} bytes")


def _unreadable(error: OSError) -> Unreadable:
    return Unreadable(f"cannot be read: {error.strerror}")


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)
