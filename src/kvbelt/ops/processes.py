"""From what is wanted (``DeploymentSpec``) to what is started (``ProcessSpec``): configuration files and command lines.

Pure but for ``write_configs``. Every worker is its own process, whose command line shows its role
(``kvbelt worker --role prefill …``), so that ``ps`` and ``pgrep`` tell who is who.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import yaml

from kvbelt.ops.ports import WORKER_HOST, Ports
from kvbelt.ops.topology import Topology
from kvbelt.ops.vllm_server import vllm_argv, vllm_env
from kvbelt.security.keys import PROXY, secret_file, trusted_folder, write_new_keys

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class DeploymentSpec:
    """What to start. Everything has the default of ``kvbelt up``."""

    topology: Topology
    model: Path  #: a local Hugging Face folder
    engine: Literal["embedded", "vllm"] = "embedded"
    dtype: str = "float32"
    device: str = "auto"
    host: str = "127.0.0.1"  #: the proxy's; workers listen on ``WORKER_HOST``
    port: int | None = None  #: the proxy's; None: 9100, or a free one with ``auto_ports``
    auto_ports: bool = False
    threads: int | None = None  #: CPU threads of each worker; None: the cores shared out evenly
    kv_gb: float | None = None  #: GB of KV memory of each worker's engine; None: the worker decides
    buffer_device: str | None = None  #: where the staging memory is: ``cpu`` or ``cuda``; None: where the engine is
    buffer_gb: float = 1.0  #: GiB of staging memory on each side of the belt (touched only as it is used)
    max_model_len: int | None = None
    log_dir: Path | None = None  #: where each process's log is written as well
    restart: bool = False  #: start a worker again that dies after the deployment was ready
    start_timeout: float = 600.0  #: seconds until everything must be ready
    worker_args: tuple[str, ...] = ()  #: appended to every worker's command line
    proxy_args: tuple[str, ...] = ()
    command: tuple[str, ...] | None = None  #: what stands before ``worker`` and ``proxy``; None: ``kvbelt_command``
    env: Mapping[str, str] = field(default_factory=dict)  #: added to every process's environment
    curve: bool = True  #: keys for the control sockets, made for this run


@dataclass(frozen=True, slots=True)
class KeyFiles:
    """The keys of one run."""

    directory: Path

    def secret(self, name: str) -> Path:
        """A process's own."""
        return secret_file(self.directory, name)

    @property
    def trusted(self) -> Path:
        """The folder of everybody's public keys."""
        return trusted_folder(self.directory)


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process."""

    name: str  #: ``prefill-0``, ``decode-0``, ``both-0``, ``proxy``
    role: str
    argv: tuple[str, ...]
    env: Mapping[str, str]  #: added to the launcher's own
    host: str
    port: int
    health_path: str | None = "/health"  #: None: it counts as ready as soon as it runs


def kvbelt_command() -> tuple[str, ...]:
    """How to call this very installation: the console script beside the interpreter, else ``python -m kvbelt``."""
    script = Path(sys.executable).with_name("kvbelt")
    return (str(script),) if os.access(script, os.X_OK) else (sys.executable, "-m", "kvbelt")


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def threads_per_worker(topology: Topology) -> int:
    """The cores shared out evenly, at least one each. The proxy needs little and is not counted."""
    return max(1, cpu_cores() // topology.workers)


def visible_gpus() -> list[str]:
    """Names of the GPUs that workers may use, as ``CUDA_VISIBLE_DEVICES`` takes them.

    Found without importing torch, which would cost the launcher seconds and hundreds of megabytes.
    """
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() and name.strip() != "-1"]
    found = (node.name.removeprefix("nvidia") for node in Path("/dev").glob("nvidia[0-9]*"))
    return sorted((name for name in found if name.isdigit()), key=int)


def resolve_device(device: str) -> str:
    """What ``auto`` means here: ``cuda`` where there is a GPU and a torch that can use it."""
    if device != "auto":
        return device
    try:
        torch_has_cuda = not metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        torch_has_cuda = False
    return "cuda" if torch_has_cuda and visible_gpus() else "cpu"


def write_keys(spec: DeploymentSpec, directory: Path) -> KeyFiles | None:
    """Make a key for every process of a deployment; None: it is to have none.

    Raises:
        StartError: this libzmq cannot do CURVE.
    """
    if not spec.curve:
        return None
    names = [f"{role}-{i}" for role in ("prefill", "decode") for i in range(getattr(spec.topology, role))]
    write_new_keys(directory, [PROXY, *names])
    return KeyFiles(directory)


def sender_config(spec: DeploymentSpec, ports: Ports) -> dict[str, Any]:
    """A prefill worker's file."""
    return {
        "local_cpu": True,
        "max_local_cpu_size": 5,
        "enable_pd": True,
        "transfer_channel": "nixl",
        "pd_role": "sender",
        "pd_proxy_host": WORKER_HOST,
        "pd_proxy_port": ports.notify,
        "pd_buffer_size": int(spec.buffer_gb * GIB),
        "pd_buffer_device": spec.buffer_device or resolve_device(spec.device),
        "nixl_backends": ["UCX"],
    }


def receiver_config(spec: DeploymentSpec, ports: Ports, index: int) -> dict[str, Any]:
    """Decode worker ``index``'s file."""
    return {
        "local_cpu": False,
        "enable_pd": True,
        "transfer_channel": "nixl",
        "pd_role": "receiver",
        "pd_peer_host": WORKER_HOST,
        "pd_peer_init_port": ports.init[index],
        "pd_peer_alloc_port": ports.alloc[index],
        "pd_buffer_size": int(spec.buffer_gb * GIB),
        "pd_buffer_device": spec.buffer_device or resolve_device(spec.device),
        "nixl_backends": ["UCX"],
    }


def write_configs(spec: DeploymentSpec, ports: Ports, directory: Path, keys: KeyFiles | None = None) -> dict[str, Path]:
    """Write each worker's YAML file; by name of the worker. Without prefill workers there is no belt, and none."""
    if spec.topology.aggregated:
        return {}
    contents = {f"prefill-{i}": sender_config(spec, ports) for i in range(spec.topology.prefill)}
    contents |= {f"decode-{i}": receiver_config(spec, ports, i) for i in range(spec.topology.decode)}
    files = {}
    for name, content in contents.items():
        if keys is not None:
            content |= {"pd_key_file": str(keys.secret(name)), "pd_trusted_keys_dir": str(keys.trusted)}
        files[name] = directory / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return files


def plan(
    spec: DeploymentSpec, ports: Ports, configs: Mapping[str, Path], keys: KeyFiles | None = None
) -> list[ProcessSpec]:
    """Every process of a deployment, workers first and the proxy last."""
    gpus = visible_gpus() if resolve_device(spec.device) == "cuda" else []
    processes: list[ProcessSpec] = []

    def add(role: str, worker_ports: Sequence[int]) -> None:
        for index, port in enumerate(worker_ports):
            name = f"{role}-{index}"
            gpu = gpus[len(processes) % len(gpus)] if gpus else None
            config = configs.get(name)
            argv = _worker_argv(spec, role, port, config)
            env = _worker_env(spec, gpu) | _engine_env(spec, config, place=len(processes))
            processes.append(ProcessSpec(name, role, argv, env, WORKER_HOST, port))

    add("prefill", ports.prefill)
    add("both" if spec.topology.aggregated else "decode", ports.decode)
    argv = _proxy_argv(spec, ports, keys)
    processes.append(ProcessSpec("proxy", "proxy", argv, _env(spec, 1), spec.host, ports.proxy))
    return processes


def _worker_argv(spec: DeploymentSpec, role: str, port: int, config: Path | None) -> tuple[str, ...]:
    if spec.engine == "vllm":
        own = vllm_argv(
            role, model=spec.model, host=WORKER_HOST, port=port, dtype=spec.dtype, max_model_len=spec.max_model_len
        )
        return (*own, *spec.worker_args)
    argv = [*(spec.command or kvbelt_command()), "worker", "--role", role]
    if config is not None:
        argv += ["--config", str(config)]
    argv += ["--model", str(spec.model), "--host", WORKER_HOST, "--port", str(port)]
    argv += ["--dtype", spec.dtype, "--device", resolve_device(spec.device), "--threads", str(_threads(spec))]
    if spec.kv_gb is not None:
        argv += ["--kv-gb", f"{spec.kv_gb:g}"]
    if spec.max_model_len is not None:
        argv += ["--max-model-len", str(spec.max_model_len)]
    return (*argv, *spec.worker_args)


def _proxy_argv(spec: DeploymentSpec, ports: Ports, keys: KeyFiles | None) -> tuple[str, ...]:
    argv = [*(spec.command or kvbelt_command()), "proxy", "--host", spec.host, "--port", str(ports.proxy)]
    argv += ["--notify-port", str(ports.notify)]
    if keys is not None:
        argv += ["--key-file", str(keys.secret(PROXY)), "--trusted-keys-dir", str(keys.trusted)]
    if ports.prefill:
        argv += ["--prefill-host", WORKER_HOST, "--prefill-port", _ports_argument(ports.prefill)]
    argv += ["--num-prefillers", str(len(ports.prefill))]
    argv += ["--decode-host", WORKER_HOST, "--decode-port", _ports_argument(ports.decode)]
    argv += ["--num-decoders", str(len(ports.decode))]
    return (*argv, *spec.proxy_args)


def _ports_argument(ports: Sequence[int]) -> str:
    # The seed's form, the first of consecutive ports, wherever it says the same; else a list.
    if list(ports) == list(range(ports[0], ports[0] + len(ports))):
        return str(ports[0])
    return ",".join(map(str, ports))


def _threads(spec: DeploymentSpec) -> int:
    return spec.threads if spec.threads is not None else threads_per_worker(spec.topology)


def _env(spec: DeploymentSpec, threads: int) -> dict[str, str]:
    # Log lines must arrive as they are written, for the launcher names the last ones of a process that dies.
    return {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads), **spec.env}


def _engine_env(spec: DeploymentSpec, config: Path | None, place: int) -> dict[str, str]:
    if spec.engine != "vllm":
        return {}
    return vllm_env(
        config=config,
        device=resolve_device(spec.device),
        threads=_threads(spec),
        place=place,
        cores=cpu_cores(),
        kv_gb=spec.kv_gb,
    )


def _worker_env(spec: DeploymentSpec, gpu: str | None) -> dict[str, str]:
    env = _env(spec, _threads(spec))
    if gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpu
        # Without cuda_ipc two GPUs of one host move 0.3 GB/s instead of 359 (docs/performance.md).
        env.setdefault("UCX_TLS", os.environ.get("UCX_TLS", "cuda_ipc,cuda_copy,tcp"))
    return env
