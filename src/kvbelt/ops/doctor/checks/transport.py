"""Whether KV uses the fastest transport.

UCX chooses silently. Without cuda_ipc in UCX_TLS, KV between two GPUs of one host goes through the CPU and TCP, and
takes 2.9 s instead of 2.7 ms (docs/performance.md).
"""

from collections.abc import Collection, Iterator

from kvbelt.channels.ucx_tls import ucx_tls_problem
from kvbelt.ops.doctor.checks.links import all_figures
from kvbelt.ops.doctor.evidence import Evidence, WorkerSeen, same_host
from kvbelt.ops.doctor.finding import Finding, Severity
from kvbelt.ops.processes import UCX_TLS_FOR_GPUS
from kvbelt.wire.about import TransportChoice

#: The value to set where UCX_TLS is set at all.
FOR_CUDA = f"UCX_TLS={UCX_TLS_FOR_GPUS}"
_FOR_CPU = "unset UCX_TLS (or UCX_TLS=all): UCX then uses shared memory within a host"


#: Links to show with a setting's cost; ``links_measured`` has all of them.
_MOST_FIGURES = 2


def _near(evidence: Evidence, worker: WorkerSeen) -> list[str]:
    """Workers of the other side on the same host."""
    others = evidence.of("decode" if worker.role == "prefill" else "prefill")
    return [other.name for other in others if same_host(worker.about, other.about)]


def _figures(evidence: Evidence, names: Collection[str]) -> tuple[str, ...]:
    """Measured links within a host from or to these workers."""
    near = [pair for pair in evidence.pairs if {pair.prefill, pair.decode} & set(names) and evidence.within_host(pair)]
    return all_figures(near[:_MOST_FIGURES])


def ucx_tls(evidence: Evidence) -> Iterator[Finding]:
    """Whether UCX_TLS allows the fast transport within a host, and is the same everywhere."""
    bad: list[tuple[WorkerSeen, str]] = []
    for worker in evidence.workers:
        said = worker.about
        if said is None or (said.compatibility is not None and said.compatibility.channel != "nixl"):
            continue
        problem = ucx_tls_problem(said.env.get("UCX_TLS"), said.buffer_device)
        if problem is not None and _near(evidence, worker):
            bad.append((worker, problem))
    if bad:
        gpu = any(worker.about is not None and worker.about.buffer_device.startswith("cuda") for worker, _ in bad)
        yield Finding(
            "ucx_tls",
            Severity.ERROR if gpu else Severity.WARNING,
            f"UCX_TLS keeps {len(bad)} of {len(evidence.workers)} workers from the fast transport within their host",
            bad[0][1],
            f"export {FOR_CUDA} before the workers' start" if gpu else _FOR_CPU,
            tuple(f"{w.role} {w.name}: UCX_TLS={w.about.env['UCX_TLS']}" for w, _ in bad if w.about is not None)
            + _figures(evidence, {worker.name for worker, _ in bad}),
        )
        return
    settings = {
        worker.about.env.get("UCX_TLS", "") for worker in evidence.workers if worker.about and worker.about.buffer_bytes
    }
    if len(settings) > 1:
        yield Finding(
            "ucx_tls_differs",
            Severity.WARNING,
            "UCX_TLS differs between the workers",
            "two workers can only use what both allow",
            f"set the same everywhere, for GPUs: export {FOR_CUDA}",
            tuple(
                f"{w.role} {w.name}: UCX_TLS={w.about.env.get('UCX_TLS', '(unset)')}"
                for w in evidence.workers
                if w.about
            ),
        )


def choices(evidence: Evidence) -> Iterator[Finding]:
    """The transports that UCX has chosen."""
    for worker in evidence.of("prefill"):
        said, near = worker.about, _near(evidence, worker)
        if said is None or not near or ucx_tls_problem(said.env.get("UCX_TLS"), said.buffer_device) is not None:
            continue  # another host, or reported already with its cause
        for choice in said.transports:
            if choice.operation == "write" and _falls_back(choice):
                yield fallback(
                    f"prefill worker {worker.name} sends KV within its host over {choice.transport}",
                    (
                        f"UCX: {choice.scope} {choice.operation} of {choice.memory} memory by {choice.transport}",
                        f"on the same host: {', '.join(near)}",
                        *_figures(evidence, {worker.name}),
                    ),
                    gpu=choice.memory == "cuda",
                )


def between_hosts(evidence: Evidence) -> Iterator[Finding]:
    """TCP between hosts, which is right where there is no RDMA."""
    lines = tuple(
        f"prefill worker {worker.name}: UCX: {choice.scope} {choice.operation} by {choice.transport}"
        for worker in evidence.of("prefill")
        if worker.about is not None
        for choice in worker.about.transports
        if choice.operation == "write" and choice.scope == "inter-node" and choice.over_tcp
    )
    if lines:
        yield Finding(
            "tcp_between_hosts",
            Severity.NOTE,
            "KV goes over TCP between hosts",
            "that is expected without InfiniBand or RoCE, and slow with them",
            "with RDMA: see that the container has the device (ibv_devinfo), and that UCX_TLS allows rc",
            lines,
        )


def complaints(evidence: Evidence) -> Iterator[Finding]:
    """UCX's own warnings."""
    lines = tuple(
        f"{worker.role} {worker.name}: {line}"
        for worker in evidence.workers
        if worker.about is not None
        for line in worker.about.complaints
    )
    if lines:
        yield Finding(
            "carrier_complaints",
            Severity.NOTE,
            "UCX has logged warnings",
            "they may be old; UCX also warns when a peer exits",
            "",
            lines,
        )


def fallback(what: str, evidence: tuple[str, ...], *, gpu: bool) -> Finding:
    """UCX uses TCP although no setting is wrong."""
    if gpu:
        why = "UCX fell back: between GPUs of one host that is 2.9 s instead of 2.7 ms for a prompt of 7,500 tokens"
        change = (
            f"export {FOR_CUDA}; in containers: the GPUs of both visible to each (NVIDIA_VISIBLE_DEVICES), --ipc=host, "
            "and no MIG between them"
        )
    else:
        why = "UCX fell back: within a host shared memory moves three times as much"
        change = (
            "allow process_vm_writev between the workers: one user and pid namespace for both, and in containers "
            "--cap-add SYS_PTRACE --ipc=host"
        )
    return Finding("tcp_fallback", Severity.ERROR if gpu else Severity.WARNING, what, why, change, evidence)


def _falls_back(choice: TransportChoice) -> bool:
    """Whether workers of one host should use another transport."""
    if choice.scope != "intra-node":
        return False
    return "cuda_ipc" not in choice.transport if choice.memory == "cuda" else choice.over_tcp
