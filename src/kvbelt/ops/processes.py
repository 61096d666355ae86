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

from kvbelt import about
from kvbelt.errors import StartError
from kvbelt.ops.ports import WORKER_HOST, Ports
from kvbelt.ops.topology import Topology
from kvbelt.ops.vllm_server import vllm_argv, vllm_env
from kvbelt.security.keys import PROXY, secret_file, trusted_folder, write_new_keys

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker runs. Its own host, if ``enter`` leads into a network namespace (network.py)."""

    host: str = WORKER_HOST  #: where it listens, and under which the others reach it
    enter: tuple[str, ...] = ()  #: what stands before its command; it must end in an exec, so that pids stay true
    env: Mapping[str, str] = field(default_factory=dict)


_HERE = Place()


@dataclass(frozen=True, slots=True)
class DeploymentSpec:
    """What to start. Everything has the default of ``kvbelt up``."""

    topology: Topology
    model: Path  #: a local Hugging Face folder
    engine: Literal["embedded", "vllm"] = "embedded"
    dtype: str = "float32"
    device: str = "auto"
    host: str = "127.0.0.1"  #: the proxy's; workers listen on ``WORKER_HOST`` or in their place
    places: Mapping[str, Place] = field(default_factory=dict)  #: of workers by name; the others run beside the proxy
    notify_host: str = WORKER_HOST  #: where the proxy takes notifications, reachable from every place
    port: int | None = None  #: the proxy's; None: 9100, or a free one with ``auto_ports``
    auto_ports: bool = False
    threads: int | None = None  #: CPU threads of each worker; None: the cores shared out evenly
    kv_gb: float | None = None  #: GB of KV memory of each worker's engine; None: the worker decides
    transfer_channel: Literal["nixl", "mooncake"] = "nixl"
    buffer_device: str | None = None  #: where the staging memory is: ``cpu`` or ``cuda``; None: where the engine is
    buffer_gb: float = 1.0  #: GiB of staging memory on each side of the belt (touched only as it is used)
    max_model_len: int | None = None
    prefix_caching: bool = True  #: workers compute the common beginnings of prompts once
    log_dir: Path | None = None  #: where each process's log is written as well
    restart: bool = False  #: start a worker again that dies after the deployment was ready
    start_timeout: float = 600.0  #: seconds until everything must be ready
    worker_args: tuple[str, ...] = ()  #: appended to every worker's command line
    proxy_args: tuple[str, ...] = ()
    command: tuple[str, ...] | None = None  #: what stands before ``worker`` and ``proxy``; None: ``kvbelt_command``
    env: Mapping[str, str] = field(default_factory=dict)  #: added to every process's environment
    curve: bool = True  #: keys for the control sockets, made for this run
    allow_slow_gpus: bool = False  #: start although UCX_TLS keeps KV between this host's GPUs from cuda_ipc
    extra_keys: tuple[str, ...] = ()  #: names of further keys that every process trusts
    belt: Mapping[str, Any] = field(default_factory=dict)  #: further keys of every worker's YAML file

    def place(self, name: str) -> Place:
        """Where a worker runs."""
        return self.places.get(name, _HERE)


#: What GPUs of one host need, and between hosts without RDMA.
UCX_TLS_FOR_GPUS = "cuda_ipc,cuda_copy,tcp"


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


def admin_key_file(directory: Path) -> Path:
    """Where the key to change the proxy's workers is, of a run whose files are in ``directory``."""
    return directory / "admin.key"


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


def require_fast_gpus(spec: DeploymentSpec, ucx_tls: str | None) -> None:
    """Refuse a setting with which KV between GPUs of this host would go through the CPU.

    UCX says nothing of it, and answers are right, only a thousand times later. What it falls back to without such a
    setting is known to nobody before the workers are connected: ``kvbelt doctor`` says so.

    Args:
        spec: what is to be started, all of it on this host.
        ucx_tls: UCX_TLS as its workers will have it; None: UCX chooses.

    Raises:
        StartError: with what to set, and how to start all the same.
    """
    buffers = spec.buffer_device or "cuda"  # where the engine is; on the CPU they are there, too
    if spec.allow_slow_gpus or spec.topology.aggregated or spec.transfer_channel != "nixl" or spec.places:
        return
    problem = about.ucx_problem(ucx_tls, "cuda")
    if problem is not None and (buffers, resolve_device(spec.device)) == ("cuda", "cuda"):
        raise StartError(
            f"UCX_TLS is {ucx_tls}: {problem}; export UCX_TLS={UCX_TLS_FOR_GPUS}, or unset it (--allow-slow-gpus "
            "starts all the same)"
        )


def write_keys(spec: DeploymentSpec, directory: Path) -> KeyFiles | None:
    """Make a key for every process of a deployment; None: it is to have none.

    Raises:
        StartError: this libzmq cannot do CURVE.
    """
    if not spec.curve:
        return None
    names = [f"{role}-{i}" for role in ("prefill", "decode") for i in range(getattr(spec.topology, role))]
    write_new_keys(directory, [PROXY, *names, *spec.extra_keys])
    return KeyFiles(directory)


def sender_config(spec: DeploymentSpec, ports: Ports) -> dict[str, Any]:
    """A prefill worker's file."""
    return {
        "local_cpu": True,
        "max_local_cpu_size": 5,
        "enable_pd": True,
        "transfer_channel": spec.transfer_channel,
        "pd_role": "sender",
        "pd_proxy_host": spec.notify_host,
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
        "transfer_channel": spec.transfer_channel,
        "pd_role": "receiver",
        "pd_peer_host": spec.place(f"decode-{index}").host,
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
        own = {"pd_key_file": str(keys.secret(name)), "pd_trusted_keys_dir": str(keys.trusted)} if keys else {}
        files[name] = directory / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump({**content, **spec.belt, **own}, sort_keys=False), encoding="utf-8")
    return files


def plan(
    spec: DeploymentSpec,
    ports: Ports,
    configs: Mapping[str, Path],
    keys: KeyFiles | None = None,
    admin_key: Path | None = None,
) -> list[ProcessSpec]:
    """Every process of a deployment, workers first and the proxy last."""
    gpus = visible_gpus() if resolve_device(spec.device) == "cuda" else []
    processes: list[ProcessSpec] = []

    def add(role: str, worker_ports: Sequence[int]) -> None:
        for index, port in enumerate(worker_ports):
            name = f"{role}-{index}"
            gpu = gpus[len(processes) % len(gpus)] if gpus else None
            config = configs.get(name)
            place = spec.place(name)
            argv = (*place.enter, *_worker_argv(spec, role, place.host, port, config))
            env = {**_worker_env(spec, gpu), **_engine_env(spec, config, place=len(processes)), **place.env}
            processes.append(ProcessSpec(name, role, argv, env, place.host, port))

    add("prefill", ports.prefill)
    add("both" if spec.topology.aggregated else "decode", ports.decode)
    argv = _proxy_argv(spec, ports, keys, admin_key)
    processes.append(ProcessSpec("proxy", "proxy", argv, _env(spec, 1), spec.host, ports.proxy))
    return processes


def _worker_argv(spec: DeploymentSpec, role: str, host: str, port: int, config: Path | None) -> tuple[str, ...]:
    if spec.engine == "vllm":
        own = vllm_argv(
            role, model=spec.model, host=host, port=port, dtype=spec.dtype, max_model_len=spec.max_model_len
        )
        return (*own, *(() if spec.prefix_caching else ("--no-enable-prefix-caching",)), *spec.worker_args)
    argv = [*(spec.command or kvbelt_command()), "worker", "--role", role]
    if config is not None:
        argv += ["--config", str(config)]
    argv += ["--model", str(spec.model), "--host", host, "--port", str(port)]
    argv += ["--dtype", spec.dtype, "--device", resolve_device(spec.device), "--threads", str(_threads(spec))]
    if spec.kv_gb is not None:
        argv += ["--kv-gb", f"{spec.kv_gb:g}"]
    if spec.max_model_len is not None:
        argv += ["--max-model-len", str(spec.max_model_len)]
    if not spec.prefix_caching:
        argv.append("--no-prefix-caching")
    return (*argv, *spec.worker_args)


def _proxy_argv(spec: DeploymentSpec, ports: Ports, keys: KeyFiles | None, admin_key: Path | None) -> tuple[str, ...]:
    argv = [*(spec.command or kvbelt_command()), "proxy", "--host", spec.host, "--port", str(ports.proxy)]
    argv += ["--notify-host", spec.notify_host, "--notify-port", str(ports.notify)]
    if keys is not None:
        argv += ["--key-file", str(keys.secret(PROXY)), "--trusted-keys-dir", str(keys.trusted)]
    if admin_key is not None:
        argv += ["--admin-key-file", str(admin_key)]
    if ports.prefill:
        hosts = [spec.place(f"prefill-{index}").host for index in range(len(ports.prefill))]
        argv += ["--prefill-host", _hosts_argument(hosts), "--prefill-port", _ports_argument(ports.prefill, hosts)]
    argv += ["--num-prefillers", str(len(ports.prefill))]
    role = "both" if spec.topology.aggregated else "decode"
    hosts = [spec.place(f"{role}-{index}").host for index in range(len(ports.decode))]
    argv += ["--decode-host", _hosts_argument(hosts), "--decode-port", _ports_argument(ports.decode, hosts)]
    argv += ["--num-decoders", str(len(ports.decode))]
    return (*argv, *spec.proxy_args)


def _hosts_argument(hosts: Sequence[str]) -> str:
    return hosts[0] if len(set(hosts)) == 1 else ",".join(hosts)


def _ports_argument(ports: Sequence[int], hosts: Sequence[str]) -> str:
    # The seed's form, the first of consecutive ports of one host, wherever it says the same; else a list.
    if len(set(hosts)) == 1 and list(ports) == list(range(ports[0], ports[0] + len(ports))):
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
        env.setdefault("UCX_TLS", os.environ.get("UCX_TLS", UCX_TLS_FOR_GPUS))
    return env
