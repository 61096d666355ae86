"""Who is dead, and who only looks like it."""

import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from kvbelt.transfer.fencing import _stat, is_dead, same_machine, this_process
from tests.transfer.belts import eventually

HERE = this_process()


@pytest.fixture
def child():
    """A process that sleeps, and what a handshake would say of it."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    start_time, _ = _stat(process.pid)
    yield process, msgspec.structs.replace(HERE, pid=process.pid, start_time=start_time)
    process.kill()
    process.wait()


def test_the_living_are_not_dead(child):
    """Neither this process nor another."""
    assert not is_dead(HERE, HERE)
    assert not is_dead(child[1], HERE)


def test_a_stopped_process_is_alive(child):
    """It may be continued, and then it writes."""
    process, identity = child
    process.send_signal(signal.SIGSTOP)
    eventually(lambda: _stat(process.pid)[1] == "T", "it is stopped")
    assert not is_dead(identity, HERE)


def test_a_zombie_is_dead(child):
    """Killed and not waited for: its memory is gone."""
    process, identity = child
    process.kill()
    eventually(lambda: is_dead(identity, HERE), "it is a zombie")
    assert Path(f"/proc/{process.pid}").exists()


def test_who_is_gone_is_dead(child):
    """Killed and waited for."""
    process, identity = child
    process.kill()
    process.wait()
    assert is_dead(identity, HERE)


def test_a_pid_used_again_does_not_hide_a_death():
    """Another start time is another process."""
    assert is_dead(msgspec.structs.replace(HERE, start_time=HERE.start_time - 1), HERE)


@pytest.mark.parametrize(
    "elsewhere",
    [{"boot_id": "another-machine"}, {"pid_namespace": "pid:[1]"}, {"boot_id": ""}],
)
def test_nobody_elsewhere_is_ever_known_to_be_dead(elsewhere):
    """A pid says nothing on another machine or in another container."""
    gone = msgspec.structs.replace(HERE, pid=2**22 + 1, start_time=1)
    assert is_dead(gone, HERE)
    assert not is_dead(msgspec.structs.replace(gone, **elsewhere), HERE)
    assert not same_machine(msgspec.structs.replace(HERE, **elsewhere), HERE)


def test_a_process_whose_main_thread_has_ended_is_alive():
    """Its leader looks like a zombie, and its threads still write."""
    code = (
        "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(600,)).start(); "
        "ctypes.CDLL(None).pthread_exit(None)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        eventually(lambda: _stat(process.pid)[1] == "Z" or process.poll() is not None, "the leader has ended")
        if process.returncode is None and len(list(Path(f"/proc/{process.pid}/task").iterdir())) > 1:
            identity = msgspec.structs.replace(HERE, pid=process.pid, start_time=_stat(process.pid)[0])
            assert not is_dead(identity, HERE)
    finally:
        process.kill()
        process.wait()
