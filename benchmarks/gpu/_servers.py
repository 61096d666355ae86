"""Start what ``serving.py`` measures: vLLM servers on GPUs (or cores), and the proxy in front of them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

HERE = Path(__file__).resolve().parent
NAME = "bench"

#: Where ports begin. A lane has its own twenty of each.
FRONT, PREFILL, DECODE, NOTIFY, SIDE_CHANNEL = 9100, 7100, 7200, 7500, 5600
LANE_PORTS = 20

#: Fewer are not dealt out: two servers, a proxy and a client would wait for each other.
LEAST_CORES = 4


@dataclass(frozen=True, slots=True)
class Lane:
    """A part of a machine for one of several systems measured side by side: GPUs, cores and ports."""

    number: int = 0
    of: int = 1
    cores: tuple[int, ...] = ()  #: that everything of the lane is bound to
    shift: int = 0  #: added to every port, on a machine where some are taken

    def port(self, base: int) -> int:
        """The first of its ports of one kind."""
        return base + LANE_PORTS * self.number + self.shift

    def half(self, number: int) -> tuple[int, ...]:
        """One half's share of its cores; all cores, if there are too few."""
        middle = len(self.cores) // 2
        return self.cores[middle * number : middle * (number + 1)] if middle >= LEAST_CORES else self.cores


def lane_of(number: int, of: int, shift: int = 0) -> Lane:
    """An equal share of neighbouring cores of this process; all cores, if there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // of
    own = cores[share * number : share * (number + 1)] if share >= LEAST_CORES else cores
    return Lane(number, of, tuple(own), shift)


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
    environment: dict[str, str] = field(default_factory=dict)  #: of every server, beside what all have
    trace: bool = False
    lane: Lane = Lane()
    halves: bool = False  #: each prefill server with a decode server by itself, before all together
    half_rates: list[float] = field(default_factory=list)
    budget_seconds: float = float("inf")  #: what does not fit is left out


@dataclass(slots=True)
class Processes:
    """Everything that was started; ended by pid."""

    logs: Path
    running: list[tuple[str, subprocess.Popen[bytes]]] = field(default_factory=list)

    def start(
        self, name: str, command: list[str], environment: dict[str, str], cores: tuple[int, ...] | None = None
    ) -> None:
        """Start a process group, on some of our cores or on all."""
        with (self.logs / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment, start_new_session=True
            )
        if cores is not None:
            os.sched_setaffinity(process.pid, cores)
        self.running.append((name, process))

    def require_alive(self) -> None:
        """Raise with the end of the log if a process has ended."""
        for name, process in self.running:
            if process.poll() is not None:
                tail = (self.logs / f"{name}.log").read_text(errors="replace")[-4000:]
                raise SystemExit(f"{name} ended with status {process.returncode}:\n{tail}")

    def stop(self, only: str = "") -> None:
        """End all, or those with this prefix: first SIGTERM, then SIGKILL."""
        ending = [process for name, process in self.running if name.startswith(only)]
        for number, seconds in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 10.0)):
            for process in ending:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            give_up = time.monotonic() + seconds
            for process in ending:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=max(0.1, give_up - time.monotonic()))
        self.running = [(name, process) for name, process in self.running if not name.startswith(only)]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server runs: its number, its GPU (or core), its port, and its half."""

    number: int
    gpu: int
    port: int
    half: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def places(plan: Plan) -> tuple[list[Place], list[Place]]:
    """Prefill and decode servers; GPUs are dealt out in that order, and repeatedly if there are too few."""
    total, lane = plan.num_prefill + plan.num_decode, plan.lane
    gpus = plan.gpus
    if not gpus:
        gpus = list(lane.cores) if plan.device == "cpu" else [total * lane.number + n for n in range(total)]
    everywhere = [gpus[number % len(gpus)] for number in range(total)]
    prefill = [Place(n, everywhere[n], lane.port(PREFILL) + n, n) for n in range(plan.num_prefill)]
    decode = [
        Place(n, everywhere[n], lane.port(DECODE) + n, n - plan.num_prefill) for n in range(plan.num_prefill, total)
    ]
    return prefill, decode


@dataclass(frozen=True, slots=True)
class Front:
    """A proxy before some servers."""

    name: str
    port: int
    notify: int
    prefill: list[Place]
    decode: list[Place]
    cores: tuple[int, ...] | None = None

    @property
    def gpus(self) -> set[int]:
        return {place.gpu for place in (*self.prefill, *self.decode)}


def whole_of(plan: Plan) -> Front:
    """The proxy before all servers."""
    return Front("proxy", plan.lane.port(FRONT), plan.lane.port(NOTIFY), *places(plan))


def halves_of(plan: Plan) -> list[Front]:
    """A proxy before each prefill server and its decode server."""
    prefill, decode = places(plan)
    return [
        Front(
            f"half{one.half}-proxy",
            plan.lane.port(FRONT) + 1 + one.half,
            plan.lane.port(NOTIFY) + 1 + one.half,
            [one],
            [other],
            plan.lane.half(one.half),
        )
        for one, other in zip(prefill, decode, strict=True)
    ]


def server(plan: Plan, processes: Processes, name: str, place: Place, kv: dict[str, Any] | None) -> None:
    """Start one vLLM server."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(plan.model), "--host", "127.0.0.1"]
    command += ["--port", str(place.port), "--served-model-name", NAME, "--no-enable-prefix-caching"]
    command += plan.server_arguments
    if kv is not None:
        command += ["--kv-transfer-config", json.dumps(kv)]
    # The packed vLLM has no FlashInfer, and its sampler is not what is measured: torch's, for every system alike.
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    environment |= {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(plan.lane.port(SIDE_CHANNEL) + place.number),
    }
    if plan.device == "cuda":
        environment |= {"CUDA_VISIBLE_DEVICES": str(place.gpu), "UCX_TLS": "cuda_ipc,cuda_copy,tcp"}
    else:
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": str(place.gpu)}
    if plan.trace:
        environment["PYTHONPATH"] = f"{Path.cwd()}:{os.environ.get('PYTHONPATH', '')}"
        environment["KVBELT_TRACE"] = str(processes.logs / f"{name}.trace")
    environment |= plan.environment
    processes.start(name, command, environment, plan.lane.half(place.half) if plan.halves else None)
    told = any(argument.startswith("--kv-cache-memory-bytes") for argument in plan.server_arguments)
    if plan.gpus and len(set(plan.gpus)) < plan.num_prefill + plan.num_decode and not told:
        # On one GPU each must have measured what memory is left before the next one takes some.
        wait_for(place.url + "/health", processes, plan.ready_seconds)


def start_system(plan: Plan, processes: Processes, system: str) -> None:
    """Start all servers of a system, and wait until they serve."""
    prefill, decode = places(plan)
    if system == "aggregated":
        for place in (*prefill, *decode):
            server(plan, processes, f"server{place.number}", place, None)
    elif system == "kvbelt":
        module = "benchmarks.gpu.traced" if plan.trace else "kvbelt.vllm"
        common = {"kv_connector": "KVBeltConnector", "kv_connector_module_path": module}
        for role, side in (("producer", prefill), ("consumer", decode)):
            for place in side:
                notify = plan.lane.port(NOTIFY) + (1 + place.half if plan.halves else 0)
                extra = {"pd_buffer_size": plan.buffer_bytes, "pd_proxy_host": "127.0.0.1", "pd_proxy_port": notify}
                kv = common | {"kv_role": f"kv_{role}", "kv_connector_extra_config": extra | plan.extra}
                server(plan, processes, f"{role}{place.number}", place, kv)
    else:
        kv = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": plan.device}
        for place in (*prefill, *decode):
            server(plan, processes, f"server{place.number}", place, kv)
    for place in (*prefill, *decode):
        wait_for(place.url + "/health", processes, plan.ready_seconds)


def start_front(processes: Processes, system: str, front: Front, arguments: Sequence[str] = ()) -> None:
    """Start a proxy, kvbelt's with these further arguments, and wait until it serves."""
    proxy = [sys.executable, "-m", "kvbelt", "proxy", "--port", str(front.port), "--notify-port", str(front.notify)]
    if system == "aggregated":
        proxy += ["--num-prefillers", "0", *_hosts("decode", [*front.prefill, *front.decode])]
    elif system == "kvbelt":
        proxy += [*_hosts("prefill", front.prefill), *_hosts("decode", front.decode), *arguments]
    else:
        proxy = [sys.executable, str(HERE / "nixl_proxy.py"), "--port", str(front.port)]
        proxy += ["--prefill", *(place.url for place in front.prefill)]
        proxy += ["--decode", *(place.url for place in front.decode)]
    processes.start(front.name, proxy, {}, front.cores)
    wait_for(f"http://127.0.0.1:{front.port}/health", processes, 60)
    if system == "kvbelt":
        wait_for_receiver(processes, front.port)


class Relay:
    """Forwards to one proxy the notifications of prefill servers that report to proxies which have ended."""

    def __init__(self, old: list[int], new: int) -> None:
        self._context = zmq.Context()
        self._threads = [threading.Thread(target=self._main, args=(port, new), daemon=True) for port in old]
        for thread in self._threads:
            thread.start()

    def _main(self, old: int, new: int) -> None:
        there, here = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        with there, here, contextlib.suppress(zmq.ContextTerminated):
            there.linger = here.linger = 0
            there.connect(f"tcp://127.0.0.1:{new}")
            here.bind(f"tcp://127.0.0.1:{old}")
            zmq.proxy(here, there)

    def close(self) -> None:
        self._context.term()
        for thread in self._threads:
            thread.join()


def _hosts(role: str, side: list[Place]) -> list[str]:
    ports = ",".join(str(place.port) for place in side)
    number = {"prefill": "--num-prefillers", "decode": "--num-decoders"}[role]
    if not side:
        return [number, "0"]
    return [f"--{role}-host", "127.0.0.1", f"--{role}-port", ports, number, str(len(side))]


def get(url: str, timeout: float = 5.0) -> bytes:
    """GET a URL.

    Raises:
        OSError: no answer, or a status other than 200.
    """
    with urllib.request.urlopen(url, timeout=timeout) as answer:  # noqa: S310 -- our own servers
        return bytes(answer.read())


def wait_for(url: str, processes: Processes, seconds: float) -> None:
    """Wait until the server answers."""
    give_up = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            get(url, 2.0)
            return
        processes.require_alive()
        if time.monotonic() > give_up:
            raise SystemExit(f"{url} does not answer after {seconds:.0f} s")
        time.sleep(0.5)


def wait_for_receiver(processes: Processes, port: int) -> None:
    """Wait until the proxy knows the belts of both servers."""
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        workers = json.loads(get(f"http://127.0.0.1:{port}/health"))["workers"]
        if all(worker["engine_id"] and worker["state"] == "ready" for worker in workers):
            return
        processes.require_alive()
        time.sleep(0.2)
    raise SystemExit(f"the proxy does not know its workers' belts: {workers}")
