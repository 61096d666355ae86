"""deploy/scripts/disagg_1p1d.sh on a laptop: the embedded engine on a CPU."""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.deploy.rendering import ROOT, UCX
from tests.e2e.asking import get, until
from tests.http.support import free_port


@pytest.fixture
def script(tmp_path):
    """A ready disagg_1p1d.sh with the tiny model on CPU: its process and its proxy's port."""
    kinds = ("PROXY", "PREFILL", "DECODE", "INIT", "ALLOC", "NOTIFY", "LIVENESS")
    ports = {f"{kind}_PORT": str(free_port()) for kind in kinds}
    env = {**os.environ, **ports, "ENGINE": "embedded", "MODEL": "tiny", "DEVICE": "cpu", "DIR": str(tmp_path),
           "KVBELT": f"{sys.executable} -m kvbelt", "WORKER_ARGS": "--threads 1 --kv-gb 0.2",
           "PROXY_ARGS": "--placement split",
           "UCX_TCP_PORT_RANGE": f"{UCX[0]}-{UCX[1]}"}  # fmt: skip
    argv = [ROOT / "deploy/scripts/disagg_1p1d.sh"]
    with (
        (tmp_path / "stderr").open("w") as stderr,
        subprocess.Popen(
            argv, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True
        ) as process,
    ):
        try:
            assert "ready on" in process.stdout.readline()
            yield process, {name.removesuffix("_PORT").lower(): int(port) for name, port in ports.items()}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
            process.wait(60)


def listening_ports(pid):
    """The TCP ports that a process listens on, at any address."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes |= set(re.findall(r"socket:\[(\d+)\]", str(entry.readlink())))
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
    ]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in inodes}


def children(pid):
    """The processes that a process has started: pid to command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
    return found


def together(url):
    """Whether the proxy sees both workers ready, and connected to each other."""
    workers = get(f"{url}/health").json()["workers"]
    return all(worker["state"] == "ready" and not worker["warming"] for worker in workers)


def answered_by_both(url, name):
    """Ask with this request id; return it if the answer went over the belt. On a busy machine a lease may expire."""
    body = {"prompt": list(range(3, 40)), "max_tokens": 4, "temperature": 0, "cache_salt": name}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers={"x-request-id": name}, timeout=60)
    assert answer.status_code == 200, answer.text
    return name if answer.headers["x-kvbelt-path"] == "first-token" else None


def lines_with(word, file):
    """The complete lines of a file that is being written."""
    return [line for line in file.read_text().splitlines(keepends=True) if word in line and line.endswith("\n")]


@pytest.mark.e2e
def test_the_script_serves_and_leaves_nothing(script, tmp_path):
    """Two workers answer, the proxy's log has the TTFT, and workers listen on the ports of the NetworkPolicy alone."""
    process, ports = script
    url = f"http://127.0.0.1:{ports['proxy']}"
    # The script is ready once one worker can answer; the proxy may see the prefill worker a moment later.
    until(lambda: together(url), what="both workers, connected")
    names = (f"asked-{number:02}" for number in itertools.count())
    asked = until(lambda: answered_by_both(url, next(names)), what="an answer by both workers")
    (line,) = until(
        lambda: lines_with(f"request_id={asked}", tmp_path / "proxy.log"), what="its log line, written after the answer"
    )
    assert "TTFT" in line
    assert "KV exposed" in line
    found = children(process.pid)
    decode = {ports[name] for name in ("decode", "init", "alloc", "liveness")}
    own = {"--role prefill": {ports["prefill"]}, "--role decode": decode}
    for role, expected in own.items():
        (pid,) = (pid for pid, command in found.items() if role in command)
        listens = listening_ports(pid)
        ucx = {port for port in listens if UCX[0] <= port <= UCX[1]}
        assert listens - ucx == expected
        assert ucx
    process.terminate()
    assert process.wait(60) == 0
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in found), what="all processes gone")
    assert "Segmentation fault" not in (tmp_path / "stderr").read_text()
