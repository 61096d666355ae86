"""Which deployments of this user run: each ``kvbelt up`` leaves a file while it serves.

With it ``kvbelt workers`` finds the admin key and the launcher of a proxy, and a second ``kvbelt up`` says that a
deployment runs already. The folder is the user's own, and a file whose launcher is dead is removed by the next reader.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kvbelt.ops.model_cache import cache_dir


class RunningWorker(msgspec.Struct, frozen=True):
    name: str  #: ``prefill-0``, ``proxy``
    role: str
    address: str  #: ``host:port``, as the proxy names it


class RunningDeployment(msgspec.Struct, frozen=True, kw_only=True):
    pid: int  #: of the launcher
    url: str  #: of the proxy
    topology: str
    model: str
    started: float  #: ``time.time()``
    admin_key_file: str
    control: str  #: the launcher's socket (control.py)
    processes: tuple[RunningWorker, ...]

    def named(self, name: str) -> RunningWorker | None:
        """A process by its name or its address."""
        return next((one for one in self.processes if name in (one.name, one.address)), None)


def _folder() -> Path:
    return cache_dir() / "running"


@contextlib.contextmanager
def announced(deployment: RunningDeployment) -> Iterator[None]:
    """Let others find a deployment. Without a writable folder nobody finds it, and it serves all the same."""
    file = _folder() / f"{deployment.pid}.json"
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.write_bytes(msgspec.json.encode(deployment))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def running_deployments() -> list[RunningDeployment]:
    """The newest first."""
    found = []
    for file in _folder().glob("*.json"):
        try:
            one = msgspec.json.decode(file.read_bytes(), type=RunningDeployment)
        except (OSError, msgspec.MsgspecError):
            continue
        if _lives(one):
            found.append(one)
        else:
            with contextlib.suppress(OSError):
                file.unlink()
    return sorted(found, key=lambda one: -one.started)


def deployment_at(url: str) -> RunningDeployment | None:
    """The deployment whose proxy has this URL."""
    return next((one for one in running_deployments() if one.url == url.rstrip("/")), None)


def age(deployment: RunningDeployment) -> str:
    """For people: ``3 min``."""
    seconds = max(0.0, time.time() - deployment.started)
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.0f} h"
    )


def _lives(deployment: RunningDeployment) -> bool:
    # The socket is gone with its launcher's folder, so a reused pid does not count.
    if not Path(deployment.control).exists():
        return False
    try:
        os.kill(deployment.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
