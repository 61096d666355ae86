"""Start what ``serving.py`` measures: vLLM servers on GPUs (or cores), and the proxy in front of them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FRONT = 9100
NAME = "bench"


@dataclass(slots=True)
class Plan:
    """What is run."""

    model: Path
    out: Path
    device: str
    rates: list[float]
    input_len: int
    output_len: int
    seconds: float
    min_prompts: int
    server_arguments: list[str]
    buffer_bytes: int
    ready_seconds: float
    num_prefill: int = 1
    num_decode: int = 1
    gpus: list[int] = field(default_factory=list)  #: one a server; empty: 0, 1, …
    repetitions: int = 1
    extra: dict[str, Any] = field(default_factory=dict)  #: of kvbelt's ``kv_connector_extra_config``
    trace: bool = False


@dataclass(slots=True)
class Processes:
    """Everything that was started, ended by pid."""

    logs: Path
    running: list[tuple[str, subprocess.Popen[bytes]]] = field(default_factory=list)

    def start(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        """Start one in a process group of its own."""
        with (self.logs / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment, start_new_session=True
            )
        self.running.append((name, process))

    def require_alive(self) -> None:
        """Raise with the end of the log if one has ended."""
        for name, process in self.running:
            if process.poll() is not None:
                tail = (self.logs / f"{name}.log").read_text(errors="replace")[-4000:]
                raise SystemExit(f"{name} ended with status {process.returncode}:\n{tail}")

    def stop(self) -> None:
        """End all: politely, then not."""
        for number, seconds in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 10.0)):
            for _, process in self.running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            give_up = time.monotonic() + seconds
            for _, process in self.running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=max(0.1, give_up - time.monotonic()))
        self.running.clear()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server runs: its number among all, its GPU (or core), its port."""

    number: int
    gpu: int
    port: int

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"


def places(plan: Plan) -> tuple[list[Place], list[Place]]:
    """Prefill and decode servers, GPUs dealt out in that order and from the beginning again where they are too few."""
    total = plan.num_prefill + plan.num_decode
    gpus = plan.gpus or list(range(total))
    everywhere = [gpus[number % len(gpus)] for number in range(total)]
    prefill = [Place(n, everywhere[n], 7100 + n) for n in range(plan.num_prefill)]
    decode = [Place(n, everywhere[n], 7200 + n) for n in range(plan.num_prefill, total)]
    return prefill, decode


def server(plan: Plan, processes: Processes, name: str, place: Place, kv: dict[str, Any] | None) -> None:
    """Start one vLLM server."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(plan.model), "--host", "127.0.0.1"]
    command += ["--port", str(place.port), "--served-model-name", NAME, "--no-enable-prefix-caching"]
    command += plan.server_arguments
    if kv is not None:
        command += ["--kv-transfer-config", json.dumps(kv)]
    # The packed vLLM has no FlashInfer, and its sampler is not what is measured: torch's, for every system alike.
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    environment |= {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(5600 + place.number)}
    if plan.device == "cuda":
        environment |= {"CUDA_VISIBLE_DEVICES": str(place.gpu), "UCX_TLS": "cuda_ipc,cuda_copy,tcp"}
    else:
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": str(place.gpu)}
    if plan.trace:
        environment["PYTHONPATH"] = f"{Path.cwd()}:{os.environ.get('PYTHONPATH', '')}"
        environment["KVBELT_TRACE"] = str(processes.logs / f"{name}.trace")
    processes.start(name, command, environment)
    if plan.gpus and len(set(plan.gpus)) < plan.num_prefill + plan.num_decode:
        # On one GPU each must have measured what memory is left before the next one takes some.
        wait_for(place.url + "/health", processes, plan.ready_seconds)


def start_system(plan: Plan, processes: Processes, system: str) -> None:
    """Start servers and the proxy of a system, and wait until it serves."""
    prefill, decode = places(plan)
    proxy = [sys.executable, "-m", "kvbelt", "proxy", "--port", str(FRONT)]
    if system == "aggregated":
        for place in (*prefill, *decode):
            server(plan, processes, f"server{place.number}", place, None)
        proxy += ["--num-prefillers", "0", *_hosts("decode", [*prefill, *decode])]
    elif system == "kvbelt":
        module = "benchmarks.gpu.traced" if plan.trace else "kvbelt.vllm"
        common = {"kv_connector": "KVBeltConnector", "kv_connector_module_path": module}
        extra = {"pd_buffer_size": plan.buffer_bytes, "pd_proxy_host": "127.0.0.1", "pd_proxy_port": 7500}
        for role, side in (("producer", prefill), ("consumer", decode)):
            for place in side:
                kv = common | {"kv_role": f"kv_{role}", "kv_connector_extra_config": extra | plan.extra}
                server(plan, processes, f"{role}{place.number}", place, kv)
        proxy += [*_hosts("prefill", prefill), *_hosts("decode", decode)]
    else:
        kv = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": plan.device}
        for place in (*prefill, *decode):
            server(plan, processes, f"server{place.number}", place, kv)
        proxy = [sys.executable, str(HERE / "nixl_proxy.py"), "--port", str(FRONT)]
        proxy += ["--prefill", *(place.url for place in prefill), "--decode", *(place.url for place in decode)]
    for place in (*prefill, *decode):
        wait_for(place.url + "/health", processes, plan.ready_seconds)
    processes.start("proxy", proxy, {})
    wait_for(f"http://127.0.0.1:{FRONT}/health", processes, 60)
    if system == "kvbelt":
        wait_for_receiver(processes)


def _hosts(role: str, side: list[Place]) -> list[str]:
    ports = ",".join(str(place.port) for place in side)
    number = {"prefill": "--num-prefillers", "decode": "--num-decoders"}[role]
    return [f"--{role}-host", "127.0.0.1", f"--{role}-port", ports, number, str(len(side))]


def get(url: str, timeout: float = 5.0) -> bytes:
    """GET.

    Raises:
        OSError: no answer, or a status other than 200.
    """
    with urllib.request.urlopen(url, timeout=timeout) as answer:  # noqa: S310 -- our own servers
        return bytes(answer.read())


def wait_for(url: str, processes: Processes, seconds: float) -> None:
    """Until it answers."""
    give_up = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            get(url, 2.0)
            return
        processes.require_alive()
        if time.monotonic() > give_up:
            raise SystemExit(f"{url} does not answer after {seconds:.0f} s")
        time.sleep(0.5)


def wait_for_receiver(processes: Processes) -> None:
    """Until the proxy knows both servers' belts."""
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        workers = json.loads(get(f"http://127.0.0.1:{FRONT}/health"))["workers"]
        if all(worker["engine_id"] and worker["state"] == "ready" for worker in workers):
            return
        processes.require_alive()
        time.sleep(0.2)
    raise SystemExit(f"the proxy does not know its workers' belts: {workers}")
