"""Turns a ``DeploymentSpec`` into configuration files and the command lines of processes.

Pure but for ``write_configs`` and ``write_keys``. Every worker is a process whose command line shows its role
(``kvbelt worker --role prefill …``), for ``ps`` and ``pgrep``.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import yaml

from kvbelt.channels.ucx_tls import ucx_tls_problem
from kvbelt.errors import StartError
from kvbelt.ops.ports import WORKER_HOST, Ports
from kvbelt.ops.topology import Topology
from kvbelt.ops.vllm_server import vllm_argv, vllm_env
from kvbelt.security.keys import PROXY, secret_file, trusted_folder, write_new_keys

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker runs. ``enter`` may lead into a network namespace (network.py)."""

    host: str = WORKER_HOST  #: its address for binding and for the other processes
    enter: tuple[str, ...] = ()  #: prefix of its command; must end in an exec, so that the pid is the worker's
    env: Mapping[str, str] = field(default_factory=dict)


_HERE = Place()


@dataclass(frozen=True, slots=True)
class DeploymentSpec:
    """What to start. The defaults are those of ``kvbelt up``."""

    topology: Topology
    model: Path  #: a local Hugging Face folder
    served_name: str | None = None  #: the model's name in requests; None: the folder's, which is always an alias
    engine: Literal["embedded", "vllm"] = "embedded"
    vllm_python: Path | None = None  #: the interpreter of vLLM's environment; None: this one
    dtype: str = "float32"
    device: str = "auto"
    host: str = "127.0.0.1"  #: the proxy's; workers listen on ``WORKER_HOST`` or in their place
    places: Mapping[str, Place] = field(default_factory=dict)  #: by worker's name; other workers run beside the proxy
    notify_host: str = WORKER_HOST  #: where the proxy takes notifications; reachable from every place
    port: int | None = None  #: the proxy's; None: 9100, or a free one with ``auto_ports``
    auto_ports: bool = False
    threads: int | None = None  #: CPU threads per worker; None: the cores are shared evenly
    kv_gb: float | None = None  #: KV memory per worker in GB; None: the worker decides
    transfer_channel: Literal["nixl", "mooncake"] = "nixl"
    buffer_device: str | None = None  #: ``cpu`` or ``cuda``; None: where the engine is
    buffer_gb: float = 1.0  #: staging memory on each side in GiB (touched only as it is used)
    max_model_len: int | None = None
    prefix_caching: bool = True  #: workers compute common prefixes of prompts once
    log_dir: Path | None = None  #: also write each process's log here
    logs_shown: bool = True  #: else they are written to files that go with the deployment, unless there is a log_dir
    restart: bool = False  #: restart a worker that dies after the deployment was ready
    start_timeout: float = 600.0  #: seconds until everything must be ready
    worker_args: tuple[str, ...] = ()  #: appended to every worker's command line
    proxy_args: tuple[str, ...] = ()
    worker_api_key: str | None = field(default=None, repr=False)  #: that vLLM servers are to ask for
    command: tuple[str, ...] | None = None  #: prefix of ``worker`` and ``proxy``; None: ``kvbelt_command``
    env: Mapping[str, str] = field(default_factory=dict)  #: added to every process's environment
    curve: bool = True  #: make keys for the control sockets
    allow_slow_gpus: bool = False  #: start although UCX_TLS excludes cuda_ipc between this host's GPUs
    extra_keys: tuple[str, ...] = ()  #: names of more keys that every process trusts
    belt: Mapping[str, Any] = field(default_factory=dict)  #: more keys of every worker's YAML file

    def place(self, name: str) -> Place:
        return self.places.get(name, _HERE)


#: For a deployment that is there to show or to try the belt.
SPLIT_ALL = ("--placement", "split")

#: For GPUs of one host, and between hosts without RDMA.
UCX_TLS_FOR_GPUS = "cuda_ipc,cuda_copy,tcp"


@dataclass(frozen=True, slots=True)
class KeyFiles:
    directory: Path

    def secret(self, name: str) -> Path:
        """A process's secret key."""
        return secret_file(self.directory, name)

    @property
    def trusted(self) -> Path:
        """The folder of all public keys."""
        return trusted_folder(self.directory)


def admin_key_file(directory: Path) -> Path:
    return directory / "admin.key"


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    name: str  #: ``prefill-0``, ``decode-0``, ``both-0``, ``proxy``
    role: str
    argv: tuple[str, ...]
    env: Mapping[str, str]  #: added to the launcher's
    host: str
    port: int
    health_path: str | None = "/health"  #: None: ready as soon as it runs


def kvbelt_command() -> tuple[str, ...]:
    """The command of this installation: the console script beside the interpreter, else ``python -m kvbelt``."""
    script = Path(sys.executable).with_name("kvbelt")
    return (str(script),) if os.access(script, os.X_OK) else (sys.executable, "-m", "kvbelt")


def cpu_cores() -> int:
    return len(os.sched_getaffinity(0))


def threads_per_worker(topology: Topology) -> int:
    """An even share of the cores, at least one. The proxy needs little and is not counted."""
    return max(1, cpu_cores() // topology.workers)


def visible_gpus() -> list[str]:
    """Names of the usable GPUs, as in ``CUDA_VISIBLE_DEVICES``.

    Does not import torch, which would cost the launcher seconds and hundreds of MB.
    """
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() and name.strip() != "-1"]
    found = (node.name.removeprefix("nvidia") for node in Path("/dev").glob("nvidia[0-9]*"))
    return sorted((name for name in found if name.isdigit()), key=int)


@cache
def _installed_torch() -> str:
    return metadata.version("torch")


def resolve_device(device: str, torch: str | None = None) -> str:
    """The device that ``auto`` means here: ``cuda`` with a GPU and a torch that can use it.

    ``torch``: its version where the workers run; None: in this environment.
    """
    if device != "auto":
        return device
    try:
        torch = torch or _installed_torch()
    except metadata.PackageNotFoundError:
        return "cpu"
    return "cuda" if not torch.endswith("+cpu") and visible_gpus() else "cpu"


def require_fast_gpus(spec: DeploymentSpec, ucx_tls: str | None) -> None:
    """Refuse a UCX_TLS that sends KV between GPUs of this host through the CPU.

    UCX does this silently, and transfers take a thousand times longer. Other fallbacks only show once the workers are
    connected; ``kvbelt doctor`` reports them.

    Args:
        spec: the deployment, all of it on this host.
        ucx_tls: UCX_TLS of its workers; None: UCX chooses.

    Raises:
        StartError: the message says what to set, and how to start anyway.
    """
    buffers = spec.buffer_device or "cuda"  # also with an engine on the CPU, to be strict
    if spec.allow_slow_gpus or spec.topology.aggregated or spec.transfer_channel != "nixl" or spec.places:
        return
    problem = ucx_tls_problem(ucx_tls, "cuda")
    if problem is not None and (buffers, resolve_device(spec.device)) == ("cuda", "cuda"):
        raise StartError(
            f"UCX_TLS is {ucx_tls}: {problem}; export UCX_TLS={UCX_TLS_FOR_GPUS}, or unset it (--allow-slow-gpus "
            "starts all the same)"
        )


def write_keys(spec: DeploymentSpec, directory: Path) -> KeyFiles | None:
    """Make a key for every process; None if the deployment has no keys.

    Raises:
        StartError: libzmq is built without CURVE.
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
    return {
        "local_cpu": False,
        "enable_pd": True,
        "transfer_channel": spec.transfer_channel,
        "pd_role": "receiver",
        "pd_peer_host": spec.place(f"decode-{index}").host,
        "pd_peer_init_port": ports.init[index],
        "pd_peer_alloc_port": ports.alloc[index],
        "pd_proxy_host": spec.notify_host,
        "pd_proxy_port": ports.notify,
        "pd_buffer_size": int(spec.buffer_gb * GIB),
        "pd_buffer_device": spec.buffer_device or resolve_device(spec.device),
        "nixl_backends": ["UCX"],
    }


def write_configs(spec: DeploymentSpec, ports: Ports, directory: Path, keys: KeyFiles | None = None) -> dict[str, Path]:
    """Write each worker's YAML file; returns paths by name, none without prefill workers, for then there is no belt."""
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


def process_specs(
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
            role,
            python=spec.vllm_python,
            model=spec.model,
            host=host,
            port=port,
            dtype=spec.dtype,
            max_model_len=spec.max_model_len,
            served_name=spec.served_name,
        )
        return (*own, *(() if spec.prefix_caching else ("--no-enable-prefix-caching",)), *spec.worker_args)
    argv = [*(spec.command or kvbelt_command()), "worker", "--role", role]
    if config is not None:
        argv += ["--config", str(config)]
    argv += ["--model", str(spec.model), "--host", host, "--port", str(port)]
    if spec.served_name is not None:
        argv += ["--served-model-name", spec.served_name]
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
    # The seed's form, the first of consecutive ports of one host, where possible; else a list.
    if len(set(hosts)) == 1 and list(ports) == list(range(ports[0], ports[0] + len(ports))):
        return str(ports[0])
    return ",".join(map(str, ports))


def _threads(spec: DeploymentSpec) -> int:
    return spec.threads if spec.threads is not None else threads_per_worker(spec.topology)


def _env(spec: DeploymentSpec, threads: int) -> dict[str, str]:
    # Unbuffered, because the launcher shows a dead process's last log lines.
    return {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads), **spec.env}


def _engine_env(spec: DeploymentSpec, config: Path | None, place: int) -> dict[str, str]:
    if spec.engine != "vllm":
        return {}
    return vllm_env(
        python=spec.vllm_python,
        config=config,
        device=resolve_device(spec.device),
        threads=_threads(spec),
        place=place,
        cores=cpu_cores(),
        kv_gb=spec.kv_gb,
        api_key=spec.worker_api_key,
    )


def _worker_env(spec: DeploymentSpec, gpu: str | None) -> dict[str, str]:
    env = _env(spec, _threads(spec))
    if gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpu
        # Without cuda_ipc two GPUs of one host move 0.3 GB/s instead of 359 (docs/performance.md).
        env.setdefault("UCX_TLS", os.environ.get("UCX_TLS", UCX_TLS_FOR_GPUS))
    return env
