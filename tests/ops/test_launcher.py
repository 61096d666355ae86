"""The launcher over real processes that stand in for kvbelt's own (standin.py)."""

import asyncio
import contextlib
import dataclasses
import io
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from kvbelt.errors import StartError
from kvbelt.ops.child import GRACE_SECONDS
from kvbelt.ops.deployment import Deployment, running
from kvbelt.ops.ports import find_free
from kvbelt.ops.supervisor import ChildDiedError, NotReadyError
from kvbelt.ops.terminal import Terminal
from kvbelt.ops.topology import Topology
from kvbelt.ops.up import FINISH_SECONDS

HERE = Path(__file__).parent


def eventually(condition, seconds=60.0):
    """Poll until ``condition()`` holds; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds} s")
        time.sleep(0.01)


def gone(pid):
    """Whether no process has this id. A zombie counts as gone: its parent is dead, and init will reap it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def listening(port):
    """Whether a process accepts connections."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def shown():
    """What the terminal shows."""
    return io.StringIO()


@contextlib.contextmanager
def launcher(topology="1p1d", port=0, **env):
    """A launcher in a process of its own; yields it with the pids of its children once it is ready."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "launcher.py"), topology, str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **env},
    )
    pids = []
    try:
        head = process.stdout.readline().split()
        assert head[:1] == ["pids"], head
        pids = [int(pid) for pid in head[1:]]
        assert process.stdout.readline().startswith("ready http://127.0.0.1:")
        yield process, pids
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        for pid in pids:
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)


def evolve(spec, **changes):
    """A copy with changes."""
    return dataclasses.replace(spec, **changes)


def test_everything_starts_and_leaves_no_trace(spec, shown):
    """2p2d is five processes with their roles on the command line; afterwards no process, port or file is left."""
    with running(evolve(spec, topology=Topology(2, 2)), Terminal(shown)) as deployment:
        assert [process.name for process in deployment.processes] == [
            "prefill-0",
            "prefill-1",
            "decode-0",
            "decode-1",
            "proxy",
        ]
        lines = [Path(f"/proc/{worker.pid}/cmdline").read_bytes().split(b"\0") for worker in deployment.workers]
        assert [line[line.index(b"--role") + 1] for line in lines] == [b"prefill", b"prefill", b"decode", b"decode"]
        configs = [Path(line[line.index(b"--config") + 1].decode()) for line in lines]
        assert all(config.is_file() for config in configs)
        assert httpx.get(f"{deployment.url}/health", timeout=60).status_code == 200
        secrets = sorted(configs[0].parent.glob("*.key_secret"))
        assert [secret.stem for secret in secrets] == ["decode-0", "decode-1", "prefill-0", "prefill-1", "proxy"]
        assert all(stat.S_IMODE(secret.stat().st_mode) == 0o600 for secret in secrets)
        assert stat.S_IMODE(configs[0].parent.stat().st_mode) == 0o700
        processes = deployment.processes
    assert all(gone(process.pid) for process in processes)
    assert not any(listening(process.port) for process in processes)
    assert not any(config.parent.exists() for config in configs)


def test_children_live_in_sessions_of_their_own(spec, shown):
    """Every child is in its own session, so Ctrl-C in the terminal reaches only the launcher."""
    with running(spec, Terminal(shown)) as deployment:
        assert all(os.getsid(process.pid) == process.pid for process in deployment.processes)


def test_logs_are_prefixed_and_kept(spec, shown, tmp_path):
    """Every line of a child appears under its name, and in its file when a folder is given."""
    with running(evolve(spec, log_dir=tmp_path / "logs"), Terminal(shown)) as deployment:
        eventually(lambda: "decode-0  | I am decode" in shown.getvalue())
        eventually(lambda: deployment.log_tail("proxy") == ["I am proxy"])
    assert (tmp_path / "logs" / "prefill-0.log").read_text() == "I am prefill\n"


def test_progress_shows_the_state_of_each_worker(spec, shown, tmp_path):
    """While workers load, the launcher prints each one's state, and then that it is ready."""
    gate = tmp_path / "gate"

    class Opening(io.StringIO):
        """Lets the workers become ready once loading was seen."""

        def write(self, text):
            if "prefill-0 loading" in text:
                gate.touch()
            return super().write(text)

    stream = Opening()
    with running(evolve(spec, env={"STANDIN_LOADING": str(gate)}), Terminal(stream)):
        assert gate.exists()
    shown = stream.getvalue()
    assert all(f"{name} ready after" in shown for name in ("prefill-0", "decode-0", "proxy"))


def test_a_start_that_times_out_names_every_state(spec, shown, tmp_path):
    """After the start's time limit the error names every state, and nothing is left running."""
    late = evolve(spec, start_timeout=0.5, env={"STANDIN_LOADING": str(tmp_path / "never")})
    with (
        pytest.raises(NotReadyError, match=r"not ready after 0\.5 s: prefill-0 \w+, decode-0 \w+, proxy"),
        running(late),
    ):
        pass


def test_child_that_dies_before_ready_is_named_with_its_logs_end(spec, shown):
    """The error has the child's name, exit status and last 20 lines; all others are ended."""
    with (
        pytest.raises(ChildDiedError) as caught,
        running(evolve(spec, env={"STANDIN_DIE": "decode"}), Terminal(shown)),
    ):
        pass
    message = str(caught.value)
    assert message.startswith("decode-0 (pid ")
    assert "exit status 7" in message
    assert message.endswith("    the reason")
    assert "line 99" in message
    assert "line 50" not in message


def test_child_that_dies_later_is_named_and_the_rest_serves_on(spec, shown):
    """A lost worker is reported; the proxy keeps serving."""
    with running(spec, Terminal(shown)) as deployment:
        os.kill(deployment.process("prefill-0").pid, signal.SIGKILL)
        eventually(lambda: "died: killed by SIGKILL" in shown.getvalue())
        eventually(lambda: "prefill-0 was the only prefill worker: decode workers compute" in shown.getvalue())
        assert not deployment.process("prefill-0").running
        assert httpx.get(f"{deployment.url}/health", timeout=60).status_code == 200


def test_restart_starts_a_dead_child_again(spec, shown):
    """With --restart a new process takes the dead one's place and port."""
    with running(evolve(spec, restart=True), Terminal(shown)) as deployment:
        before = deployment.process("decode-0")
        os.kill(before.pid, signal.SIGKILL)
        eventually(lambda: deployment.process("decode-0").pid != before.pid)
        assert deployment.process("decode-0").port == before.port
        eventually(lambda: listening(before.port))


def test_restart_on_demand_waits_for_readiness(spec, shown):
    """restart() ends one process and returns when the new one is ready."""
    with running(spec, Terminal(shown)) as deployment:
        before = deployment.process("decode-0")
        deployment.restart("decode-0")
        after = deployment.process("decode-0")
        assert after.pid != before.pid
        assert listening(after.port)
        assert gone(before.pid)
    assert "died" not in shown.getvalue()


def test_restart_alone_does_not_wait_for_workers(spec, shown, tmp_path):
    """With ``alone`` a proxy only has to answer; its workers need not be ready."""
    ready = tmp_path / "ready"
    ready.touch()

    async def restart():
        async with Deployment(evolve(spec, env={"STANDIN_LOADING": str(ready)}), Terminal(shown)) as deployment:
            before = deployment.process("proxy")
            ready.unlink()
            await deployment.restart("proxy", alone=True)
            return before.pid, deployment.process("proxy").pid

    before, after = asyncio.run(restart())
    assert before != after


def test_frozen_child_is_ended_too(spec, shown):
    """A child stopped by SIGSTOP does not survive the launcher."""
    with running(spec, Terminal(shown)) as deployment:
        pid = deployment.process("prefill-0").pid
        os.kill(pid, signal.SIGSTOP)
    assert gone(pid)


def test_busy_port_starts_nothing(spec, shown):
    """A taken port is refused before any process starts."""
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(StartError, match=f"port {taken.getsockname()[1]} for the proxy"),
        running(evolve(spec, port=taken.getsockname()[1]), Terminal(shown)),
    ):
        pass
    assert "I am" not in shown.getvalue()


def test_unknown_program_is_one_line(spec, shown):
    """A program that does not exist is named."""
    with (
        pytest.raises(StartError, match=r"prefill-0: cannot run /no/such/kvbelt: No such file"),
        running(evolve(spec, command=("/no/such/kvbelt",)), Terminal(shown)),
    ):
        pass


@pytest.mark.parametrize(
    ("number", "stubborn"), [(signal.SIGTERM, "decode"), (signal.SIGINT, "nobody"), (signal.SIGHUP, "nobody")]
)
def test_signal_ends_everything(number, stubborn):
    """SIGTERM, Ctrl-C or a closed terminal: status 0, no process, no port, even when a child ignores SIGTERM."""
    port = find_free(1)[0]
    with launcher(port=port, STANDIN_IGNORE_TERM=stubborn) as (process, pids):
        process.send_signal(number)
        assert process.wait(timeout=60) == 0
        assert all(gone(pid) for pid in pids)
        assert not listening(port)


def test_open_requests_are_waited_for_until_a_second_signal():
    """The first signal shows how many are open, the second ends everything at once."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "launcher.py"), "1p1d", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "STANDIN_OPEN": "2"},
    )
    with process:
        pids = [int(pid) for pid in process.stdout.readline().split()[1:]]
        process.terminate()
        for line in process.stderr:
            if "2 requests are open" in line:
                break
        assert not any(gone(pid) for pid in pids)
        process.terminate()
        assert process.wait(timeout=60) == 0
        assert "2 requests are cut off" in process.stderr.read()
        assert all(gone(pid) for pid in pids)


def test_what_is_waited_for_leaves_room_within_five_seconds():
    """The waits of a shutdown add up to less than 5 s, the time in which everything must be gone."""
    assert GRACE_SECONDS + FINISH_SECONDS <= 4.0


def test_signal_while_starting_ends_everything(tmp_path):
    """A signal before readiness ends with status 0 as well."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "launcher.py"), "1p1d", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "STANDIN_LOADING": str(tmp_path / "never")},
    )
    with process:
        for line in process.stderr:
            if "prefill-0 loading" in line:
                break
        process.terminate()
        assert process.wait(timeout=60) == 0
        assert process.stdout.read() == ""


def test_killed_launcher_takes_its_children_along(tmp_path):
    """Even kill -9 of the launcher leaves no child behind."""
    with launcher(TMPDIR=str(tmp_path)) as (process, pids):  # where its files stay behind
        assert not any(gone(pid) for pid in pids)
        process.kill()
        process.wait()
        eventually(lambda: all(gone(pid) for pid in pids))


def test_dead_start_has_status_1_and_refused_start_status_2():
    """A child that dies is status 1; a start that is refused is one line and status 2."""
    command = [sys.executable, str(HERE / "launcher.py"), "1p1d"]
    died = subprocess.run(
        [*command, "0"], capture_output=True, text=True, env={**os.environ, "STANDIN_DIE": "prefill"}, check=False
    )
    assert died.returncode == 1
    assert "the reason" in died.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = subprocess.run([*command, str(taken.getsockname()[1])], capture_output=True, text=True, check=False)
    assert busy.returncode == 2
    assert len(busy.stderr.splitlines()) == 1
