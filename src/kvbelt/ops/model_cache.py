"""Models that kvbelt makes itself, in the user's cache.

1. A folder appears complete or not at all: it is written under a temporary name and renamed.
2. Two processes at once make it only once: the second waits for the first one's lock file.
3. It is made in a child process, so that the caller never imports torch.
"""

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kvbelt.errors import StartError
from kvbelt.ops.terminal import Terminal

#: Between two signs of life while a model is made: on a terminal, which redraws one line, and elsewhere.
_REDRAW_SECONDS = 0.2
_LINE_SECONDS = 15.0


def cache_dir() -> Path:
    """The cache folder: $KVBELT_CACHE, else $XDG_CACHE_HOME/kvbelt, else ~/.cache/kvbelt."""
    if own := os.environ.get("KVBELT_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "kvbelt"
    return Path.home() / ".cache" / "kvbelt"


def make_once(
    target: Path, command: Sequence[str], what: str, progress: Callable[[str], None], *, needed_bytes: int
) -> Path:
    """Make the folder ``target`` with ``command FOLDER`` if it does not exist. Returns ``target``.

    Args:
        target: the folder.
        command: writes everything into the folder that is its last argument, and the steps that it takes, a line
            each, to standard output.
        what: the model's description, for people.
        progress: gets one line for each slow step.
        needed_bytes: of free disk, while it is made.

    Raises:
        StartError: the command failed, or the cache is full or not writable.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / f"{target.name}.lock").open("w") as lock:
            _acquire(lock.fileno(), what, progress)
            if not target.is_dir():
                _require_disk(target.parent, needed_bytes, what)
                progress(f"making {what} in {target}")
                _make(target, command, what, progress)
                progress(f"{what}: ready")
    except OSError as error:
        raise StartError(
            f"{what} cannot be kept in {target.parent}: {error}; set KVBELT_CACHE to a writable folder"
        ) from error
    return target


def _require_disk(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StartError(
            f"{what} needs {needed / 1e6:.0f} MB of disk in {folder}, and {free / 1e6:.0f} MB are free; free some, or "
            "set KVBELT_CACHE to a folder with more"
        )


def _acquire(fd: int, what: str, progress: Callable[[str], None]) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        progress(f"another process is making {what}; waiting for it")
        fcntl.flock(fd, fcntl.LOCK_EX)


def _make(target: Path, command: Sequence[str], what: str, progress: Callable[[str], None]) -> None:
    # Beside the target, so that the rename stays within one file system.
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _run([*command, str(scratch)], what, progress)
        scratch.chmod(0o755)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run(command: Sequence[str], what: str, progress: Callable[[str], None]) -> None:
    board = Terminal()
    pause = _REDRAW_SECONDS if board.redraws else _LINE_SECONDS
    began = time.monotonic()
    with (
        tempfile.TemporaryFile() as steps,
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=steps, stderr=errors) as child,
    ):
        try:
            while True:
                try:
                    child.wait(pause)
                    break
                except subprocess.TimeoutExpired:
                    line = f"{(_lines(steps.fileno()) or ['starting'])[-1]}, {time.monotonic() - began:.0f} s"
                    board.redraw([line]) if board.redraws else progress(line)
        finally:
            child.kill()  # if it was interrupted
            board.stop_redrawing()
        if child.returncode != 0:
            tail = " | ".join(_lines(errors.fileno())[-3:])
            raise StartError(f"making {what} failed (status {child.returncode}): {tail}")


def _lines(fd: int) -> list[str]:
    # pread leaves alone the place where the child goes on writing, which it shares.
    return os.pread(fd, 1 << 20, 0).decode(errors="replace").strip().splitlines()
