"""Real vLLM servers for tests: started by us, ended by pid, logs kept in a folder."""

# ruff: noqa: S310 -- the URLs are our own servers

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.http.support import free_port

#: Starting takes 26 to 60 s on an idle machine of two cores, and longer beside others.
START_SECONDS = 300.0


PIPELINE = "--pipeline-parallel-size"


def has_ranks(arguments: Sequence[str]) -> bool:
    """Whether a server's command line gives it several ranks."""
    return PIPELINE in arguments or "--tensor-parallel-size" in arguments


@dataclass(frozen=True, slots=True)
class Traces:
    """The destination of a server's spans."""

    endpoint: str
    protocol: str


@dataclass(slots=True)
class Server:
    """One vLLM server's process group."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def post(self, path: str, body: dict[str, Any], timeout: float = 120.0) -> dict[str, Any]:
        """Post, and parse the answer.

        Raises:
            urllib.error.HTTPError: a status other than 2xx.
        """
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.loads(answer.read())

    def metric(self, name: str, label: str = "") -> float:
        """The sum of a metric over its labels, or over those with one given as ``name="value"``."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith((name + "{", name + " ")) and label in line
        )

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=10):
                return True
        except OSError:
            return False

    def tail(self, lines: int = 30) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def signal(self, number: int) -> None:
        """Signal every process of the server."""
        os.killpg(self.process.pid, number)

    def stop(self) -> None:
        for number, seconds in ((signal.SIGCONT, 0.0), (signal.SIGTERM, 15.0), (signal.SIGKILL, 10.0)):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                break
            try:
                self.process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                continue
        # Its engine's process is of the same group, and may outlive the one that was waited for.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@dataclass(slots=True)
class Fleet:
    """Servers that are started together and ended together."""

    model: Path
    logs: Path
    arguments: tuple[str, ...] = ("--dtype", "float32", "--max-model-len", "2048", "--enforce-eager")
    servers: list[Server] = field(default_factory=list)

    def start(
        self,
        name: str,
        kv_transfer: dict[str, Any] | None,
        *arguments: str,
        core: int = 0,
        traces: Traces | None = None,
        one_process: bool = False,
        host: str = "127.0.0.1",
        enter: tuple[str, ...] = (),
    ) -> Server:
        """Start one; ``wait`` waits for all.

        ``one_process``: scheduler and worker share one, as they do on a GPU. On a CPU vLLM parts them unless it is told
        that nothing is to be parted (its HTTP server is, all the same).
        ``enter`` stands before the command, and leads to ``host``.
        """
        port = free_port()
        command = [
            *enter,
            sys.executable,
            "-m",
            "vllm.entrypoints.cli.main",
            "serve",
            str(self.model),
            "--port",
            str(port),
        ]
        own = self.arguments
        if PIPELINE in arguments:
            # vLLM 0.32 for CPUs makes what a stage gets from the one before only where it warms up to compile.
            own = tuple(each for each in own if each != "--enforce-eager")
            own += ("--compilation-config", '{"mode": 1, "backend": "eager"}')
        command += ["--host", host, "--served-model-name", "demo", *own, *arguments]
        if kv_transfer is not None:
            command += ["--kv-transfer-config", json.dumps(kv_transfer)]
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # Ranks need a core each, so such servers share all there are.
            "VLLM_CPU_OMP_THREADS_BIND": "0|1" if has_ranks(arguments) else str(core),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # for /reset_prefix_cache
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        }
        if traces is not None:
            command += ["--otlp-traces-endpoint", traces.endpoint]
            environment |= {
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": traces.protocol,
                "OTEL_SERVICE_NAME": name,
                "OTEL_BSP_SCHEDULE_DELAY": "200",  # not 5 s
            }
        if one_process:
            # vLLM does not say either how many threads may compute, then.
            environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
            command += ["--distributed-executor-backend", "uni"]
        log = self.logs / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
        server = Server(name, port, process, log, host)
        self.servers.append(server)
        return server

    def wait(self, seconds: float = START_SECONDS) -> None:
        """Wait until every server answers.

        Raises:
            RuntimeError: one has ended, or takes too long.
        """
        give_up = time.monotonic() + seconds
        for server in self.servers:
            while not server.ready():
                if server.process.poll() is not None or time.monotonic() > give_up:
                    raise RuntimeError(f"{server.name} did not start:\n{server.tail(60)}")
                time.sleep(0.5)

    def stop(self) -> None:
        for server in self.servers:
            server.stop()
        self.servers.clear()


def kvbelt(role: str, **extra: Any) -> dict[str, Any]:
    """``--kv-transfer-config`` of a server with this connector."""
    return {
        "kv_connector": "KVBeltConnector",
        "kv_connector_module_path": "kvbelt.vllm",
        "kv_role": role,
        "kv_connector_extra_config": {"pd_buffer_size": 256 << 20, **extra},
    }


def beside_offloading(belt: dict[str, Any], *, gigabytes: float = 0.25) -> dict[str, Any]:
    """``--kv-transfer-config`` of a server with this connector, and after it vLLM's own that keeps KV in memory."""
    store = {
        "spec_name": "HostStore",
        "spec_module_path": "tests.vllm.offload_on_cpu",
        "cpu_bytes_to_use": int(gigabytes * (1 << 30)),
    }
    offloading = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": store}
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [belt, offloading]},
    }
