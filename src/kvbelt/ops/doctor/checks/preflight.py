"""The checks before a start, in the order of causes."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import metadata

from packaging.requirements import Requirement

from kvbelt.channels.ucx_tls import ucx_tls_problem
from kvbelt.ops.doctor.checks.capacity import lopsided, small_buffer
from kvbelt.ops.doctor.checks.graphics import lines_of, no_gpu
from kvbelt.ops.doctor.checks.links import NVLINK_GB_PER_SECOND
from kvbelt.ops.doctor.checks.transport import FOR_CUDA, fallback
from kvbelt.ops.doctor.finding import Finding, Severity, in_order
from kvbelt.ops.doctor.preflight import RECEIVER_PORTS, FileSeen, Preflight
from kvbelt.settings import BeltFile
from kvbelt.vllm.versions import NEWEST, OLDEST, Age, age_of


def packages(before: Preflight) -> Iterator[Finding]:
    """Installed packages against the requirements of this kvbelt."""
    installed, vllm = before.here.packages, before.here.packages.get("vllm")
    engine = "vllm" if vllm is not None else "embedded"
    if "nixl" not in installed and "torch" not in installed:
        yield Finding(
            "no_engine",
            Severity.NOTE if before.topology is None and not before.files else Severity.ERROR,
            "this environment runs the proxy and the tools, but no worker",
            "neither torch nor NIXL is installed",
            "pip install 'kvbelt[embedded]'; for vLLM 'kvbelt[vllm]' into its environment",
        )
        engine = ""
    for line in _requirements():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": engine}):
            continue
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            found = ""
        if not found or not wanted.specifier.contains(found, prereleases=True):
            yield Finding(
                "packages",
                Severity.ERROR,
                f"{wanted.name} is {found or 'not installed'}; this kvbelt needs {wanted.specifier or 'it'}",
                "it is written for and tested with those versions",
                f"pip install '{wanted.name}{wanted.specifier}'",
            )
    if vllm is not None and (age := age_of(vllm)) is not Age.TRIED:
        yield Finding(
            "packages",
            Severity.ERROR if age is Age.OLDER else Severity.WARNING,
            f"vLLM is {vllm}; this kvbelt is tried with {OLDEST} to {NEWEST}",
            "its connector refuses older versions"
            if age is Age.OLDER
            else "its connector starts if vLLM's hooks and KV memory are as it knows them, and nobody has tried more",
            f"pip install 'vllm=={NEWEST}.*'",
        )
    versions = ", ".join(f"{name} {version}" for name, version in sorted(before.here.packages.items()))
    yield Finding(
        "versions",
        Severity.NOTE,
        f"kvbelt {before.here.kvbelt}, Python {before.here.python}",
        "versions must be equal on all hosts",
        "",
        (versions,),
    )


def _requirements() -> list[str]:
    try:
        return metadata.requires("kvbelt") or []
    except metadata.PackageNotFoundError:
        return []  # not installed as a package: no requirements to compare


def files_read(before: Preflight) -> Iterator[Finding]:
    """Every file is valid."""
    for file in before.files:
        if file.problem:
            yield Finding(
                "bad_file",
                Severity.ERROR,
                f"{file.path} cannot be used",
                "the worker refuses to start with it",
                file.problem.rpartition("; ")[2],
                (file.problem,),
            )
        elif file.belt is not None and not file.belt.enable_pd:
            yield Finding(
                "bad_file",
                Severity.ERROR,
                f"{file.path} does not enable disaggregated prefill",
                "a worker of --role prefill or decode refuses to start with it",
                "enable_pd: True",
                (f"enable_pd: {file.belt.enable_pd}",),
            )


#: Keys whose values must be equal in all files.
_SAME: dict[str, Callable[[BeltFile], object]] = {
    "transfer_channel": lambda file: file.transfer_channel,
    "nixl_backends": lambda file: file.nixl_backends if file.transfer_channel == "nixl" else None,
    "mooncake_protocol": lambda file: (
        (file.mooncake_protocol or "tcp") if file.transfer_channel == "mooncake" else None
    ),
    "pd_key_file (set or not)": lambda file: file.pd_key_file is not None,
}


def files_agree(before: Preflight) -> Iterator[Finding]:
    """The files fit together."""
    usable = [(file, file.belt) for file in before.files if file.belt is not None and file.belt.enable_pd]
    for key, value_of in _SAME.items():
        found: dict[str, list[str]] = defaultdict(list)
        for file, belt in usable:
            if (value := value_of(belt)) is not None:
                found[str(value)].append(str(file.path))
        if len(found) > 1:
            yield Finding(
                "files_differ",
                Severity.ERROR,
                f"{key} differs between the files",
                "workers with different values refuse each other at the handshake",
                f"{key.partition(' ')[0]}: the same in every file",
                tuple(f"{value}: {', '.join(paths)}" for value, paths in found.items()),
            )
    yield from _sides(before, usable)
    yield from _same_ports(usable)


def _sides(before: Preflight, usable: list[tuple[FileSeen, BeltFile]]) -> Iterator[Finding]:
    roles = {belt.pd_role for _, belt in usable}
    if len(before.files) > 1 and usable and roles != {"sender", "receiver"}:
        missing = "receiver" if "sender" in roles else "sender"
        yield Finding(
            "one_side",
            Severity.WARNING,
            f"none of the files has pd_role: {missing}",
            "a transfer needs both sides",
            f"add the files of the {'decode' if missing == 'receiver' else 'prefill'} workers (--config FILE)",
        )
    proxies = {(belt.pd_proxy_host, belt.pd_proxy_port) for _, belt in usable}
    if len(proxies - {(None, None)}) > 1:
        yield Finding(
            "proxies_differ",
            Severity.WARNING,
            "the workers report to different proxies",
            "a proxy without reports waits for transfers in vain, and does not know how busy a worker is",
            "pd_proxy_host and pd_proxy_port: the same in every file",
            tuple(f"{host}:{port}" for host, port in proxies),
        )


def _same_ports(usable: list[tuple[FileSeen, BeltFile]]) -> Iterator[Finding]:
    places: dict[tuple[str, int], list[str]] = defaultdict(list)
    for file, belt in usable:
        for key in RECEIVER_PORTS:
            given = getattr(belt, key)
            for port in given if isinstance(given, list) else [given]:
                if port is not None and belt.pd_role == "receiver":
                    places[belt.pd_peer_host or "", port].append(f"{file.path}: {key}")
    for (host, port), owners in places.items():
        if len(owners) > 1:
            yield Finding(
                "ports_clash",
                Severity.ERROR,
                f"port {port} on {host} is given twice",
                "the second process will not start",
                f"{owners[-1].rpartition(' ')[2]}: another port",
                tuple(owners),
            )


#: More workers for each core are slow even while all but one of them rest.
_WORKERS_PER_CORE = 2


def machine_holds(before: Preflight) -> Iterator[Finding]:
    """The machine has cores and memory for the topology."""
    fit = before.fit
    if fit is None:
        return
    if fit.refused or fit.short:
        yield Finding(
            "too_little_memory",
            Severity.ERROR if fit.refused else Severity.WARNING,
            f"this machine cannot hold {before.topology}" if fit.refused else f"memory is short for {before.topology}",
            "kvbelt up refuses to start it" if fit.refused else "the kernel ends a worker when the memory is used up",
            "fewer workers, a smaller model, or workers on several machines (docs/deployment.md)",
            (fit.refused or fit.short,),
        )
    if fit.crowded:
        many = fit.workers > _WORKERS_PER_CORE * fit.cores
        yield Finding(
            "too_few_cores",
            Severity.WARNING if many else Severity.NOTE,
            fit.crowded,
            "each step of a worker waits for the others'; first tokens come late, whatever their number",
            "as many workers as cores (or GPUs) at most, or workers on several machines",
        )


def buffer_devices(before: Preflight) -> Iterator[Finding]:
    """Buffers in GPU memory need a GPU."""
    wanting = [file.path for file in before.files if file.belt is not None and file.belt.pd_buffer_device == "cuda"]
    if wanting and before.device == "cpu":
        yield Finding(
            "buffer_device",
            Severity.WARNING,
            "pd_buffer_device is cuda, and this machine has no GPU that workers could use",
            "a worker that runs on the CPU takes host memory instead; one that is to run on a GPU does not find it",
            "pd_buffer_device: cpu; or make the GPU visible: nvidia-smi, CUDA_VISIBLE_DEVICES, docker run --gpus all",
            tuple(str(path) for path in wanting),
        )


def host_memory(before: Preflight) -> Iterator[Finding]:
    """Keys of the guides that one of the two engines has no use for."""
    files = [str(file.path) for file in before.files if file.belt is not None and file.belt.pd_role == "sender"]
    keeping = [str(one.path) for one in before.files if one.belt is not None and one.belt.local_cpu]
    if found := [path for path in files if path in keeping]:
        yield Finding(
            "host_memory",
            Severity.NOTE,
            "local_cpu and max_local_cpu_size have an effect in vLLM servers only",
            "a worker with the embedded engine keeps KV in its own memory (--kv-gb), and no second copy of it",
            "",
            tuple(found),
        )


def ports_free(before: Preflight) -> Iterator[Finding]:
    """Every port can be bound."""
    for port in before.ports:
        if port.problem:
            yield Finding(
                "port_taken",
                Severity.ERROR,
                f"port {port.use.port} for {port.use.owner} is taken or cannot be bound",
                "that process will not start",
                f"find the process: ss -ltnp 'sport = :{port.use.port}'; or choose another ({port.use.flag})",
                (f"{port.use.host}:{port.use.port}: {port.problem}",),
            )


def ratio(before: Preflight) -> Iterator[Finding]:
    yield from lopsided(*before.sides())


def carrier(before: Preflight) -> Iterator[Finding]:
    """UCX_TLS, NIXL, and the transports that UCX chooses."""
    problem = ucx_tls_problem(before.here.env.get("UCX_TLS"), before.device)
    if problem is not None:
        yield Finding(
            "ucx_tls",
            Severity.ERROR if before.device == "cuda" else Severity.WARNING,
            "UCX_TLS excludes the fast transport within this host",
            problem,
            f"export {FOR_CUDA}" if before.device == "cuda" else "unset UCX_TLS",
            (f"UCX_TLS={before.here.env['UCX_TLS']}",),
        )
    found = before.measured
    if found is None:
        return
    if found.error:
        yield Finding(
            "nixl",
            Severity.ERROR,
            "NIXL moves nothing here",
            "transfer_channel: nixl cannot transfer KV",
            "pip install 'nixl>=1.5.1,<2'; with GPUs: a driver that fits (nvidia-smi)",
            (found.error,),
        )
        return
    writes = [choice for choice in found.transports if choice.operation == "write"]
    slow = before.device == "cuda" and found.write_gb_per_second < NVLINK_GB_PER_SECOND
    over_tcp = any(choice.over_tcp for choice in writes)
    if (slow or over_tcp) and problem is None:
        yield fallback(
            "UCX has nothing better than TCP between two processes of this host"
            if over_tcp
            else "KV transfers between two GPUs of this host are slow",
            (
                f"WRITE {found.write_gb_per_second:.3g} GB/s",
                *(f"UCX: {choice.scope} by {choice.transport}" for choice in writes),
                f"UCX could use: {', '.join(found.resources) or 'unknown'}",
            ),
            gpu=before.device == "cuda",
        )
    transports = ", ".join(
        dict.fromkeys(f"{choice.operation} {choice.scope} by {choice.transport}" for choice in found.transports)
    )
    yield Finding(
        "nixl",
        Severity.NOTE,
        f"NIXL moves {found.device} memory between two processes: WRITE {found.write_gb_per_second:.3g} GB/s, READ "
        f"{found.read_gb_per_second:.3g} GB/s",
        "measured between two processes of this host with this environment",
        "",
        (
            (
                f"{found.num_bytes / 1e6:.0f} MB per transfer; 4 KiB: WRITE {found.write_us:.0f} µs, READ "
                f"{found.read_us:.0f} µs"
            ),
            f"UCX could use: {', '.join(found.resources) or 'unknown'}",
            f"UCX has chosen: {transports or 'unknown (UCX_LOG_FILE or UCX_PROTO_INFO is set)'}",
            f"backends in use: {', '.join(found.backends)}; plugins: {', '.join(found.plugins)}",
            *found.complaints[:3],
        ),
    )


def buffers(before: Preflight) -> Iterator[Finding]:
    """The receive buffers against the model's KV."""
    model = before.model
    if model is None:
        return
    if model.problem:
        yield Finding(
            "model",
            Severity.WARNING,
            f"the KV size of {model.path} is unknown",
            "buffers are not checked",
            "",
            (model.problem,),
        )
        return
    tokens = before.max_model_len or model.context
    longest = model.bytes_per_token * tokens
    if before.topology is not None and before.topology.prefill and not before.files and longest:
        whose = "each decode worker of kvbelt up (1 GiB by default)"
        yield from small_buffer(whose, 1 << 30, model.bytes_per_token, tokens, "--buffer-gb {gib}")
    for file in before.files:
        belt = file.belt
        if belt is None or belt.pd_role != "receiver" or not belt.pd_buffer_size or not longest:
            continue
        yield from small_buffer(str(file.path), belt.pd_buffer_size, model.bytes_per_token, tokens)


def graphics(before: Preflight) -> Iterator[Finding]:
    """GPUs that are missing or in use."""
    if before.gpus is None:
        yield no_gpu("the embedded engine uses the CPU")
        return
    lines = lines_of(before.gpus)
    used = [gpu for gpu in before.gpus if gpu.memory_used > 0.1]
    if used:
        yield Finding(
            "gpu_taken",
            Severity.WARNING,
            f"{len(used)} of {len(before.gpus)} GPUs are in use already",
            "a model and its KV may not fit",
            "end the processes that use them (see nvidia-smi), or choose others: CUDA_VISIBLE_DEVICES=…",
            lines,
        )
    else:
        yield Finding("gpus", Severity.NOTE, f"{len(before.gpus)} GPUs on this host", "they are free", "", lines)


CHECKS: tuple[Callable[[Preflight], Iterator[Finding]], ...] = (
    packages,
    files_read,
    files_agree,
    ports_free,
    machine_holds,
    buffer_devices,
    host_memory,
    carrier,
    buffers,
    ratio,
    graphics,
)


def diagnose(before: Preflight) -> list[Finding]:
    """All findings, causes first."""
    return in_order([finding for check in CHECKS for finding in check(before)])
