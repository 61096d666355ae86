"""One fleet of real vLLM servers for all tests of this folder that ask for it. Skipped where vLLM is not installed.

``KVBELT_VLLM_SHAPE`` is ``1p1d`` (default) or ``2p2d``; ``KVBELT_VLLM_ARGUMENTS`` goes to every server, for other block
and chunk sizes (``scripts/test-vllm`` runs the combinations).
"""

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvbelt.security.keys import secret_file, trusted_folder, write_new_keys
from tests.vllm.servers import Fleet, Server, free_port, kvbelt


@dataclass(frozen=True, slots=True)
class Deployment:
    """A plain server to compare with, prefill and decode servers, and a proxy before them."""

    plain: Server
    prefill: list[Server]
    decode: list[Server]
    proxy: Server

    def workers(self) -> list[dict[str, object]]:
        """As the proxy sees them."""
        with urllib.request.urlopen(self.proxy.url + "/health", timeout=5) as answer:  # noqa: S310 -- ours
            return json.loads(answer.read())["workers"]


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Started once, about a minute on two idle cores."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed (scripts/test-vllm installs it)")
    model = os.environ.get("KVBELT_VLLM_MODEL")
    if model is None:
        pytest.skip("KVBELT_VLLM_MODEL names no model folder (scripts/test-vllm sets it)")
    number = int(os.environ.get("KVBELT_VLLM_SHAPE", "1p1d")[0])
    logs = tmp_path_factory.mktemp("vllm")
    fleet = Fleet(Path(model), logs)
    extra = shlex.split(os.environ.get("KVBELT_VLLM_ARGUMENTS", ""))
    keys = logs / "keys"
    write_new_keys(keys, ["proxy", "prefill", "decode"])
    notify = free_port()
    cores = len(os.sched_getaffinity(0))
    try:
        plain = fleet.start("plain", None, *extra, core=0)
        told = {"pd_proxy_host": "127.0.0.1", "pd_proxy_port": notify, **keys_for("prefill", keys)}
        # Long prompts take several steps, so that one can be seen in vLLM's metrics while it is computed.
        chunks = () if "--max-num-batched-tokens" in extra else ("--max-num-batched-tokens", "256")
        prefill = [
            fleet.start(f"prefill{i}", kvbelt("kv_producer", **told), *extra, *chunks, core=i % cores)
            for i in range(number)
        ]
        decode = [
            fleet.start(f"decode{i}", kvbelt("kv_consumer", **keys_for("decode", keys)), *extra, core=(i + 1) % cores)
            for i in range(number)
        ]
        fleet.wait()
        proxy = start_proxy(fleet, prefill, decode, notify, keys)
        found = Deployment(plain, prefill, decode, proxy)
        wait_until(lambda: all(worker["engine_id"] for worker in found.workers()), 30)
        yield found
    finally:
        fleet.stop()


def keys_for(name: str, keys: Path) -> dict[str, str]:
    """A server's settings that name its key, and whom it trusts."""
    return {"pd_key_file": str(secret_file(keys, name)), "pd_trusted_keys_dir": str(trusted_folder(keys))}


def start_proxy(fleet: Fleet, prefill: list[Server], decode: list[Server], notify: int, keys: Path) -> Server:
    """``kvbelt proxy`` as a process."""
    port = free_port()
    command = [sys.executable, "-m", "kvbelt", "proxy", "--port", str(port), "--notify-port", str(notify)]
    command += ["--key-file", str(secret_file(keys, "proxy")), "--trusted-keys-dir", str(trusted_folder(keys))]
    for kind, servers in (("prefill", prefill), ("decode", decode)):
        command += [f"--{kind}-host", "127.0.0.1", f"--{kind}-port", ",".join(str(server.port) for server in servers)]
    log = fleet.logs / "proxy.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    server = Server("proxy", port, process, log)
    fleet.servers.append(server)
    wait_until(server.ready, 30)
    return server


def wait_until(condition, seconds: float) -> None:
    """Poll a condition, with a deadline."""
    give_up = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > give_up:
            pytest.fail(f"did not become true within {seconds} s")
        time.sleep(0.05)


@contextlib.contextmanager
def stopped(server: Server) -> Iterator[None]:
    """SIGSTOP its processes, and let them go on afterwards."""
    server.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.signal(signal.SIGCONT)
