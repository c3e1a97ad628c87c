"""Access checks for other users."""

import os
import pwd
import stat
from pathlib import Path

from infra.local.state import StackError


def check_reachable(path: Path, user: str) -> None:
    """Check that a user may enter every parent directory of a path.

    Raises:
        StackError: a directory is not accessible; the message contains the first one.
    """
    account = pwd.getpwnam(user)
    groups = set(os.getgrouplist(user, account.pw_gid))
    for directory in reversed(path.resolve().parents):
        status = directory.stat()
        needed = (
            stat.S_IXUSR
            if status.st_uid == account.pw_uid
            else stat.S_IXGRP
            if status.st_gid in groups
            else stat.S_IXOTH
        )
        if not status.st_mode & needed:
            raise StackError(
                f"OpenSearch runs as user {user!r}, which cannot reach {path}: {directory} has mode "
                f"{stat.filemode(status.st_mode)}.\nPermit others to enter this directory (chmod o+x), or set other "
                "directories with FRESHLINE_HOME (data) and FRESHLINE_CACHE (programs)."
            )
