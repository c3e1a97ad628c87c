"""Whether another user can get at a path."""

import os
import pwd
import stat
from pathlib import Path

from infra.local.state import StackError


def check_reachable(path: Path, user: str) -> None:
    """Make sure that a user may enter every directory on the way to a path.

    Raises:
        StackError: it may not; the message names the first directory that stops it.
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
                f"{stat.filemode(status.st_mode)}.\nLet others enter that directory (chmod o+x), or choose other "
                "places with FRESHLINE_HOME (data) and FRESHLINE_CACHE (programs)."
            )
