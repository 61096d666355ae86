"""Starting and stopping: the command line's errors, mixed models, and a demo that ends by itself."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from kvbelt.ops.deployment import running
from kvbelt.ops.tiny_model import tiny_model_dir
from tests.e2e.asking import get, until
from tests.e2e.conftest import deployment_spec
from tests.http.support import free_port

pytestmark = pytest.mark.e2e

KVBELT = [sys.executable, "-m", "kvbelt"]


def refusal(*args: str) -> str:
    """Run a command that must be refused with status 2. Returns the line on standard error."""
    done = subprocess.run([*KVBELT, *args], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_unknown_role() -> None:
    """The error names the valid roles."""
    assert "'prefill'" in refusal("worker", "--role", "prefiller", "--model", "demo")


def test_unknown_option_names_the_one_it_resembles() -> None:
    assert "--decode-host" in refusal("proxy", "--decode-hots", "x")


def test_unknown_model_folder(tmp_path: Path) -> None:
    """The error names the folder and the valid values."""
    line = refusal("up", "1p1d", "--model", str(tmp_path / "nowhere"))
    assert "nowhere" in line
    assert "demo" in line


def test_unknown_yaml_key_names_the_one_it_resembles(tmp_path: Path) -> None:
    """The error names the file, the key and the right key."""
    file = tmp_path / "prefill.yaml"
    file.write_text("enable_pd: True\npd_bufer_size: 5\n", encoding="utf-8")
    line = refusal("worker", "--role", "prefill", "--config", str(file), "--model", "demo")
    assert "pd_bufer_size" in line
    assert "pd_buffer_size" in line
    assert "prefill.yaml" in line


def test_busy_port(demo_model: Path) -> None:
    """The error names the port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal("worker", "--role", "both", "--model", str(demo_model), "--port", str(port))
    assert str(port) in line


def _decode_config(folder: Path, *, alloc_port: int) -> Path:
    file = folder / "decode.yaml"
    file.write_text(
        "enable_pd: True\ntransfer_channel: nixl\npd_role: receiver\npd_peer_host: 127.0.0.1\n"
        f"pd_peer_init_port: {free_port()}\npd_peer_alloc_port: {alloc_port}\n"
        "pd_buffer_size: 16777216\npd_buffer_device: cpu\nnixl_backends: [UCX]\n",
        encoding="utf-8",
    )
    return file


def _tiny_decode_worker(config: Path, port: int) -> list[str]:
    return [*KVBELT, "worker", "--role", "decode", "--config", str(config), "--model", "tiny", "--port", str(port),
            "--device", "cpu", "--kv-gb", "0.1"]  # fmt: skip


def test_a_worker_told_to_stop_ends_with_status_0(tmp_path: Path) -> None:
    """The status is 0 whatever the transport's libraries do at the process's end."""
    port = free_port()
    config = _decode_config(tmp_path, alloc_port=free_port())
    with subprocess.Popen(_tiny_decode_worker(config, port), stderr=subprocess.DEVNULL) as worker:
        try:
            _until_ready(f"http://127.0.0.1:{port}")
            worker.terminate()
            assert worker.wait(60) == 0
        finally:
            worker.kill()


def test_a_busy_port_of_the_belt(tmp_path: Path) -> None:
    """The error names the port, and the status is 2 although the transport is loaded by then."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = _tiny_decode_worker(_decode_config(tmp_path, alloc_port=port), free_port())
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert str(port) in done.stderr.splitlines()[-1]


def test_bad_topology() -> None:
    """The error shows the form of a topology."""
    assert "1p1d" in refusal("up", "one-and-one")


def test_up_serves_and_leaves_nothing() -> None:
    """``kvbelt up`` prints ready, serves, and ends with status 0 within 5 s of SIGTERM; no process stays.

    A stream that is open then comes to its end first.
    """
    # Everything holds each time; the 5 s hold where the machine lets it run, so it may be asked again.
    assert any(_up_and_down() < 5 for _ in range(3))


def _up_and_down() -> float:
    """Start and end a deployment. Returns the seconds of the end."""
    command = [*KVBELT, "up", "1p1d", "--model", "tiny", "--auto-ports", "--device", "cpu", "--kv-gb", "0.5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as up:
        try:
            assert up.stdout is not None
            ready = up.stdout.readline()
            found = re.fullmatch(r"ready (http://127\.0\.0\.1:\d+)\n", ready)
            assert found, ready
            children = subprocess.run(["ps", "-ww", "--ppid", str(up.pid), "-o", "pid=,args="], capture_output=True,
                                      text=True, check=True).stdout  # fmt: skip
            assert "worker --role prefill" in children
            assert "worker --role decode" in children
            pids = [int(line.split()[0]) for line in children.splitlines() if "kvbelt" in line]
            assert len(pids) == 3
            body = {"prompt": "Twelve monkeys", "max_tokens": 4, "temperature": 0}
            reply = httpx.post(found[1] + "/v1/completions", json=body, timeout=60)
            assert reply.headers["x-kvbelt-path"] == "local; reason=calm"
            body = {"prompt": "Twelve monkeys", "max_tokens": 1000, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", found[1] + "/v1/completions", json=body, timeout=60) as stream:
                lines = stream.iter_lines()
                assert next(lines).startswith("data: {")
                up.send_signal(signal.SIGTERM)
                events = [line for line in lines if line.startswith("data: ")]
            started = time.monotonic()
            assert events[-1] == "data: [DONE]"
            assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
            assert up.wait(timeout=60) == 0
            seconds = time.monotonic() - started
            assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        finally:
            up.kill()
    return seconds


def test_mixed_models_are_refused_at_the_handshake(tmp_path: Path) -> None:
    """A decode worker with other weights refuses the prefill worker, naming both; answers stay right."""
    model, other = tiny_model_dir(print), tmp_path / "other-model"
    shutil.copytree(model, other)
    weights = next(other.glob("*.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-20_000:] = bytes(20_000)
    weights.write_bytes(raw)
    with running(deployment_spec(model, "1p1d")) as mixed:
        decode = mixed.process("decode-0")
        body = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
        config = _config_of(mixed.process("prefill-0").pid)
        port = free_port()
        command = [*KVBELT, "worker", "--role", "prefill", "--config", config, "--model", str(other), "--port",
                   str(port), "--device", "cpu", "--dtype", "float32", "--kv-gb", "0.5", "--max-model-len", "2048",
                   "--served-model-name", "other"]  # fmt: skip
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as misfit:
            try:
                _until_ready(f"http://127.0.0.1:{port}")
                receiver = get(decode.url + "/health").json()["receiver"]
                handoff = {"transfer_id": "mixed", "receiver": receiver, "deadline_seconds": 10}
                httpx.post(f"http://127.0.0.1:{port}/v1/completions",
                           json={**body, "max_tokens": 1, "kv_transfer_params": handoff}, timeout=30)  # fmt: skip
                state = httpx.post(
                    f"http://127.0.0.1:{port}/v1/completions",
                    json={**body, "max_tokens": 1, "kv_transfer_params": {**handoff, "transfer_id": "mixed-2"}},
                    timeout=30,
                ).json()["kv_transfer_params"]
            finally:
                misfit.terminate()
                log = misfit.communicate(timeout=60)[1]
        assert "refused" in json.dumps(state) + log
        assert "other" in log
        assert model.name in log
        reply = httpx.post(mixed.url + "/v1/completions", json=body, timeout=60)
        assert reply.status_code == 200


def _config_of(pid: int) -> str:
    argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return argv[argv.index("--config") + 1]


def _until_ready(url: str) -> None:
    def ready() -> bool:
        try:
            return get(url + "/health").status_code == 200
        except httpx.HTTPError:
            return False

    until(ready, within=120, what="the worker ready")


def test_the_demo_ends_by_itself(demo_model: Path) -> None:
    """``kvbelt demo --once`` prints an answer and where its time went, and ends with status 0."""
    done = subprocess.run([*KVBELT, "demo", "--once"], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    for span in ("prefill", "transfer", "exposed"):
        assert span in done.stdout
