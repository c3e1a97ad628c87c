"""Documents in a folder: which files there are, and their contents, whatever else lies there.

What cannot be read is named and counts as present: that it is gone is only said of a name that a complete listing of
its folder lacks. Nothing is opened that could make a reader wait, or do something, when it is opened.
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
"""Files beyond are not even read into memory; the service's own limit is usually lower."""

_READS: Final = 3
"""Tries to read a file that is being written."""

_KINDS: Final = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class Unreadable(Exception):
    """A file has no content that can be sent; the message says why."""


@dataclass(slots=True)
class Listing:
    """What is in a folder.

    Attributes:
        files: name below the root → path, of every document, sorted by name; readable or not.
        passed_over: name as it can be shown → why it is no document; not of what is hidden.
        problems: the same of folders that could not be listed.
        unlisted: names of folders whose entries are not known: what was in them may still be there.
    """

    files: dict[str, Path] = field(default_factory=dict)
    passed_over: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    unlisted: set[str] = field(default_factory=set)

    def may_hold(self, name: str) -> bool:
        """Whether the document ``name`` is there, or could be in a folder that could not be listed."""
        parents = (parent.as_posix() for parent in PurePosixPath(name).parents)
        return name in self.files or not self.unlisted.isdisjoint((name, *parents))


def list_folder(root: Path, place: Path) -> Listing:
    """Every document at or below ``place``, which lies in ``root``; both are resolved.

    Folders behind links are not followed, and hidden ones are not looked into.

    Raises:
        OSError: the root itself cannot be listed, so nothing is known of what it holds.
    """
    listing = Listing()
    name = place.relative_to(root).as_posix()
    if place == root:
        _list_into(listing, root, root)
    elif not _is_hidden(name) and os.path.realpath(place.parent) == str(place.parent):
        _list_place(listing, root, place, name)
    listing.files = dict(sorted(listing.files.items()))
    return listing


def sha256_of(path: Path) -> str:
    """Hash of the file's content.

    Raises:
        Unreadable: see there.
    """
    try:
        with _open_regular(path) as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(error) from error


def read(path: Path) -> bytes:
    """The file's content, of one moment.

    Raises:
        Unreadable: see there; also where it changes each time that it is read.
    """
    try:
        for _ in range(_READS):
            with _open_regular(path) as opened:
                before = os.fstat(opened.fileno())
                content = opened.read(LARGEST_BYTES + 1)
                after = os.fstat(opened.fileno())
            same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
            if same and len(content) == after.st_size:
                return content
    except OSError as error:
        raise _unreadable(error) from error
    raise Unreadable("changes while it is read; the next run tries again")


def shown(name: str) -> str:
    """A name as it can be printed: bytes that are no UTF-8 are escaped."""
    return os.fsencode(name).decode(errors="backslashreplace")


def why_no_document(name: str) -> str | None:
    """Why a file of this name is no document; None where it is one."""
    # Names that are not UTF-8 come as lone surrogates, which no document id can hold.
    if any("\ud800" <= char <= "\udfff" for char in name):
        return "its name is not UTF-8: rename it"
    return why_unsupported(name)


def _list_place(listing: Listing, root: Path, place: Path, name: str) -> None:
    try:
        found = os.lstat(place)
    except (FileNotFoundError, NotADirectoryError):
        # That it is gone says something only while the root is there.
        os.close(os.open(root, os.O_RDONLY | os.O_DIRECTORY))
    except OSError as error:
        _leave_unlisted(listing, name, error)
    else:
        if stat.S_ISDIR(found.st_mode):
            _list_into(listing, root, place)
        else:
            _take(listing, root, place, name)


def _leave_unlisted(listing: Listing, name: str, error: OSError) -> None:
    listing.unlisted.add(name)
    # One that vanished meanwhile is nobody's fault; what was in it is found gone by the next look.
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        listing.problems[f"{shown(name)}/"] = f"cannot be listed: {error.strerror}; what was sent of it stays"


def _list_into(listing: Listing, root: Path, top: Path) -> None:
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        name = folder.relative_to(root).as_posix()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    path = folder / entry.name
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(path)
                    else:
                        _take(listing, root, path, path.relative_to(root).as_posix())
        except OSError as error:
            if folder == root:
                raise
            _leave_unlisted(listing, name, error)


def _take(listing: Listing, root: Path, path: Path, name: str) -> None:
    reason = why_no_document(name)
    if reason is None and not Path(os.path.realpath(path)).is_relative_to(root):
        reason = "it is a link that leads out of the folder"
    if reason is None:
        listing.files[name] = path
    else:
        listing.passed_over[shown(name)] = reason


def _open_regular(path: Path) -> BufferedReader:
    """Open an ordinary file; what else could make the caller wait, or do something, is not opened at all."""
    _check_regular(path.stat())
    # It may have become something else since; a pipe that is opened like this does not wait for a writer.
    opened = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        _check_regular(os.fstat(opened.fileno()))
    except Unreadable:
        opened.close()
        raise
    return opened


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise Unreadable(f"is {_KINDS.get(stat.S_IFMT(found.st_mode), 'no file')}, not an ordinary file")
    if found.st_size > LARGEST_BYTES:
        raise Unreadable(f"larger than {LARGEST_BYTES:,} bytes")


def _unreadable(error: OSError) -> Unreadable:
    return Unreadable(f"cannot be read: {error.strerror}")


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)
