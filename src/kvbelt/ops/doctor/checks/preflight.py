"""The checks before a start, in the order of causes."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import metadata

from packaging.requirements import Requirement

from kvbelt import about
from kvbelt.ops.doctor.before import Before, FileSeen
from kvbelt.ops.doctor.checks.capacity import small_buffer
from kvbelt.ops.doctor.checks.links import NVLINK_GB_PER_SECOND
from kvbelt.ops.doctor.checks.transport import FOR_CUDA, fallback
from kvbelt.ops.doctor.finding import Finding, Severity, in_order
from kvbelt.routing.ratio import MOST_PREFILL_PER_DECODE
from kvbelt.settings import BeltFile
from kvbelt.vllm.versions import SUPPORTED


def packages(before: Before) -> Iterator[Finding]:
    """What is installed is what this kvbelt needs."""
    for line in _requirements():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
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
                "it was written for and tested with those versions",
                f"pip install '{wanted.name}{wanted.specifier}'",
            )
    vllm = before.here.packages.get("vllm")
    if vllm is not None and ".".join(vllm.split(".")[:2]) not in SUPPORTED:
        yield Finding(
            "packages",
            Severity.ERROR,
            f"vLLM is {vllm}; this kvbelt supports {' and '.join(f'{one}.x' for one in SUPPORTED)}",
            "its connector refuses to load in another one: a hook that has moved gives wrong answers",
            f"pip install 'vllm=={SUPPORTED[-1]}.*'",
        )
    versions = ", ".join(f"{name} {version}" for name, version in sorted(before.here.packages.items()))
    yield Finding(
        "versions",
        Severity.NOTE,
        f"kvbelt {before.here.kvbelt}, Python {before.here.python}",
        "they must be the same on every host",
        "",
        (versions,),
    )


def _requirements() -> list[str]:
    try:
        return metadata.requires("kvbelt") or []
    except metadata.PackageNotFoundError:
        return []  # on the path and not installed: nothing says what it needs


def files_read(before: Before) -> Iterator[Finding]:
    """Each file loads."""
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
                f"{file.path} does not switch disaggregated prefill on",
                "a worker of --role prefill or decode refuses to start with it",
                "enable_pd: True",
                (f"enable_pd: {file.belt.enable_pd}",),
            )


#: Keys that must say the same in every file.
_SAME: dict[str, Callable[[BeltFile], object]] = {
    "transfer_channel": lambda file: file.transfer_channel,
    "nixl_backends": lambda file: file.nixl_backends if file.transfer_channel == "nixl" else None,
    "mooncake_protocol": lambda file: (
        (file.mooncake_protocol or "tcp") if file.transfer_channel == "mooncake" else None
    ),
    "pd_key_file (set or not)": lambda file: file.pd_key_file is not None,
}


def files_agree(before: Before) -> Iterator[Finding]:
    """The files fit each other."""
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
                "two such workers refuse each other at the handshake",
                f"{key.partition(' ')[0]}: the same in every file",
                tuple(f"{value}: {', '.join(paths)}" for value, paths in found.items()),
            )
    yield from _sides(before, usable)
    yield from _same_ports(usable)


def _sides(before: Before, usable: list[tuple[FileSeen, BeltFile]]) -> Iterator[Finding]:
    roles = {belt.pd_role for _, belt in usable}
    if len(before.files) > 1 and usable and roles != {"sender", "receiver"}:
        missing = "receiver" if "sender" in roles else "sender"
        yield Finding(
            "one_side",
            Severity.WARNING,
            f"none of the files has pd_role: {missing}",
            "KV needs both sides",
            f"give the files of the {'decode' if missing == 'receiver' else 'prefill'} workers, too (--config FILE)",
        )
    proxies = {(belt.pd_proxy_host, belt.pd_proxy_port) for _, belt in usable if belt.pd_role == "sender"}
    if len(proxies) > 1:
        yield Finding(
            "proxies_differ",
            Severity.WARNING,
            "the senders report transfers to different proxies",
            "a proxy that is not told of a transfer waits for its end for nothing, and counts none",
            "pd_proxy_host and pd_proxy_port: the same in every sender's file",
            tuple(f"{host}:{port}" for host, port in proxies),
        )


def _same_ports(usable: list[tuple[FileSeen, BeltFile]]) -> Iterator[Finding]:
    places: dict[tuple[str, int], list[str]] = defaultdict(list)
    for file, belt in usable:
        for key in ("pd_peer_init_port", "pd_peer_alloc_port"):
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
                "the second to start finds it taken",
                f"{owners[-1].rpartition(' ')[2]}: another port",
                tuple(owners),
            )


def ports_free(before: Before) -> Iterator[Finding]:
    """Nobody listens where we are going to."""
    for port in before.ports:
        if port.problem:
            yield Finding(
                "port_taken",
                Severity.ERROR,
                f"port {port.claim.port} for {port.claim.owner} is taken or cannot be bound",
                "that process will not start",
                f"find out who has it: ss -ltnp 'sport = :{port.claim.port}'; or choose another ({port.claim.flag})",
                (f"{port.claim.host}:{port.claim.port}: {port.problem}",),
            )


def ratio(before: Before) -> Iterator[Finding]:
    """The seed's anti-pattern 3."""
    prefill, decode = before.sides()
    if decode and prefill > MOST_PREFILL_PER_DECODE * decode:
        yield Finding(
            "ratio",
            Severity.WARNING,
            f"{prefill} prefill workers against {decode} decode workers",
            "first tokens will come soon, and then answers wait in the decode workers' queues",
            f"1:1 or 1:2 is usual: kvbelt up {decode}p{prefill}d has as many workers",
            (f"{prefill}:{decode}; more than {MOST_PREFILL_PER_DECODE} to 1",),
        )


def carrier(before: Before) -> Iterator[Finding]:
    """UCX_TLS, NIXL, and what UCX chooses."""
    problem = about.ucx_problem(before.here.env.get("UCX_TLS"), before.device)
    if problem is not None:
        yield Finding(
            "ucx_tls",
            Severity.ERROR if before.device == "cuda" else Severity.WARNING,
            "UCX_TLS keeps workers from the fast way within this host",
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
            "KV cannot be carried with transfer_channel: nixl",
            "pip install 'nixl>=1.5.1,<2'; with GPUs: a driver that fits (nvidia-smi)",
            (found.error,),
        )
        return
    writes = [road for road in found.roads if road.operation == "write"]
    slow = before.device == "cuda" and found.write_gb_per_second < NVLINK_GB_PER_SECOND
    over_tcp = any(road.over_tcp for road in writes)
    if (slow or over_tcp) and problem is None:
        yield fallback(
            "UCX has nothing better than TCP between two processes of this host"
            if over_tcp
            else "KV crosses slowly between two GPUs of this host",
            (
                f"WRITE {found.write_gb_per_second:.3g} GB/s",
                *(f"UCX: {road.scope} by {road.transport}" for road in writes),
                f"UCX could use: {', '.join(found.resources) or 'it does not say'}",
            ),
            gpu=before.device == "cuda",
        )
    transports = ", ".join(dict.fromkeys(f"{road.operation} {road.scope} by {road.transport}" for road in found.roads))
    yield Finding(
        "nixl",
        Severity.NOTE,
        f"NIXL moves {found.device} memory between two processes: WRITE {found.write_gb_per_second:.3g} GB/s, READ "
        f"{found.read_gb_per_second:.3g} GB/s",
        "measured just now, between two processes of this host with this environment",
        "",
        (
            (
                f"{found.num_bytes / 1e6:.0f} MB a transfer; 4 KiB: WRITE {found.write_us:.0f} µs, READ "
                f"{found.read_us:.0f} µs"
            ),
            f"UCX could use: {', '.join(found.resources) or 'it does not say'}",
            f"UCX has chosen: {transports or 'it does not say (UCX_LOG_FILE or UCX_PROTO_INFO is set)'}",
            f"backends in use: {', '.join(found.backends)}; plugins: {', '.join(found.plugins)}",
            *found.complaints[:3],
        ),
    )


def buffers(before: Before) -> Iterator[Finding]:
    """What the receive buffers hold of this model."""
    model = before.model
    if model is None:
        return
    if model.problem:
        yield Finding(
            "model",
            Severity.WARNING,
            f"the KV of {model.path} cannot be reckoned",
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


def graphics(before: Before) -> Iterator[Finding]:
    """Is there a GPU, and is it free?"""
    if before.gpus is None:
        yield Finding(
            "no_gpu",
            Severity.NOTE,
            "no GPU",
            "nvidia-smi is not here, or shows none: the embedded engine computes on the CPU",
            "",
        )
        return
    lines = tuple(
        f"GPU {g.index} {g.name}: busy {g.utilisation:.0f} %, memory {g.memory_used:.0%}" for g in before.gpus
    )
    used = [gpu for gpu in before.gpus if gpu.memory_used > 0.1]
    if used:
        yield Finding(
            "gpu_taken",
            Severity.WARNING,
            f"{len(used)} of {len(before.gpus)} GPUs are in use already",
            "a model and its KV may not find room",
            "end who has them (nvidia-smi lists processes), or choose others: CUDA_VISIBLE_DEVICES=…",
            lines,
        )
    else:
        yield Finding("gpus", Severity.NOTE, f"{len(before.gpus)} GPUs on this host", "they are free", "", lines)


CHECKS: tuple[Callable[[Before], Iterator[Finding]], ...] = (
    packages,
    files_read,
    files_agree,
    ports_free,
    carrier,
    buffers,
    ratio,
    graphics,
)


def diagnose(before: Before) -> list[Finding]:
    """Every finding, the cause first."""
    return in_order([finding for check in CHECKS for finding in check(before)])
