"""Whether a writer is dead: the only proof, besides its own word, that it will never write again.

Proof needs the same machine (boot id) and the same pid namespace; then the process is dead when its pid is
gone, belongs to a process that started at another time, or is a zombie without other threads. A stopped
process is alive: it may be continued, and then it writes. Where there is no proof the answer is "not
known to be dead", and the slot stays quarantined.
"""

import os
from pathlib import Path

from kvbelt.wire.handshake import ProcessIdentity


def this_process() -> ProcessIdentity:
    """Of the calling process."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
        start_time, _ = _stat(os.getpid())
    except OSError:
        return ProcessIdentity(boot_id="", pid_namespace="", pid=os.getpid(), start_time=0)
    return ProcessIdentity(boot_id=boot_id, pid_namespace=namespace, pid=os.getpid(), start_time=start_time)


def same_machine(one: ProcessIdentity, other: ProcessIdentity) -> bool:
    """Whether one can see whether the other lives."""
    return bool(one.boot_id) and (one.boot_id, one.pid_namespace) == (other.boot_id, other.pid_namespace)


def is_dead(process: ProcessIdentity, here: ProcessIdentity) -> bool:
    """Whether ``process`` is known to be dead, as seen from process ``here``."""
    # It is what a peer says of itself: what is no process id proves nothing, and the kernel would not take it.
    if not same_machine(process, here) or not 0 < process.pid < 1 << 31:
        return False
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # alive, and another user's
    try:
        start_time, state = _stat(process.pid)
        if start_time != process.start_time:
            return True
        return state in "ZX" and len(list(Path(f"/proc/{process.pid}/task").iterdir())) <= 1
    except OSError:
        return False  # gone just now, or hidden: the next look will tell


def _stat(pid: int) -> tuple[int, str]:
    """Start time in clock ticks, and state."""
    # The second field is the program's name in parentheses, and may contain anything.
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return int(fields[19]), fields[0]
