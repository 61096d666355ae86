"""Who may read a file that holds a secret."""

import os
import stat


def others_may_read(status: os.stat_result, user: int | None = None) -> bool:
    """Whether somebody beside the process that uses a secret file may read or change it.

    Its owner may, and nobody else. For a process that is not root a file of root's may be readable by a group, too: so
    Kubernetes mounts Secrets (``fsGroup``), and PostgreSQL takes the same of its private keys.

    Args:
        status: of the file.
        user: as whom the process runs; None: ask.
    """
    user = os.geteuid() if user is None else user
    by_group = stat.S_IRGRP if status.st_uid == 0 != user else 0
    return bool(stat.S_IMODE(status.st_mode) & (stat.S_IRWXG | stat.S_IRWXO) & ~by_group)
