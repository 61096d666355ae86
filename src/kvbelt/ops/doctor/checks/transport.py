"""Does KV take the road that it could?

UCX chooses, and says nothing: without cuda_ipc in UCX_TLS, KV between two GPUs of one host goes through the CPU and
TCP, and takes 2.9 s instead of 2.7 ms (docs/performance.md).
"""

from collections.abc import Collection, Iterator

from kvbelt import about
from kvbelt.ops.doctor.checks.links import all_figures
from kvbelt.ops.doctor.evidence import Evidence, PairSeen, WorkerSeen, same_host
from kvbelt.ops.doctor.finding import Finding, Severity
from kvbelt.ops.processes import UCX_TLS_FOR_GPUS
from kvbelt.wire.about import Road

#: What to set where UCX_TLS is set at all.
FOR_CUDA = f"UCX_TLS={UCX_TLS_FOR_GPUS}"
_FOR_CPU = "unset UCX_TLS (or UCX_TLS=all): UCX then takes shared memory within a host"


#: Of links, to show what a setting costs; every link stands in ``links_measured``.
_MOST_FIGURES = 2


def _near(evidence: Evidence, worker: WorkerSeen) -> list[str]:
    """Workers of the other side on the same host."""
    others = evidence.of("decode" if worker.role == "prefill" else "prefill")
    return [other.name for other in others if same_host(worker.about, other.about)]


def _figures(evidence: Evidence, names: Collection[str]) -> tuple[str, ...]:
    """What was measured of the links within a host that begin or end at these workers."""
    near = [
        pair for pair in evidence.pairs if {pair.prefill, pair.decode} & set(names) and _within_host(evidence, pair)
    ]
    return all_figures(near[:_MOST_FIGURES])


def _within_host(evidence: Evidence, pair: PairSeen) -> bool:
    prefill, decode = evidence.worker(pair.prefill), evidence.worker(pair.decode)
    return prefill is not None and decode is not None and same_host(prefill.about, decode.about)


def ucx_tls(evidence: Evidence) -> Iterator[Finding]:
    """What is set allows the fast way between workers of one host; and is the same everywhere."""
    bad: list[tuple[WorkerSeen, str]] = []
    for worker in evidence.workers:
        said = worker.about
        if said is None or (said.compatibility is not None and said.compatibility.channel != "nixl"):
            continue
        problem = about.ucx_problem(said.env.get("UCX_TLS"), said.buffer_device)
        if problem is not None and _near(evidence, worker):
            bad.append((worker, problem))
    if bad:
        gpu = any(worker.about is not None and worker.about.buffer_device.startswith("cuda") for worker, _ in bad)
        yield Finding(
            "ucx_tls",
            Severity.ERROR if gpu else Severity.WARNING,
            f"UCX_TLS keeps {len(bad)} of {len(evidence.workers)} workers from the fast way within their host",
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
            "two workers can use only what both allow",
            f"set the same everywhere, for GPUs: export {FOR_CUDA}",
            tuple(
                f"{w.role} {w.name}: UCX_TLS={w.about.env.get('UCX_TLS', '(unset)')}"
                for w in evidence.workers
                if w.about
            ),
        )


def roads(evidence: Evidence) -> Iterator[Finding]:
    """What UCX has really chosen."""
    for worker in evidence.of("prefill"):
        said, near = worker.about, _near(evidence, worker)
        if said is None or not near or about.ucx_problem(said.env.get("UCX_TLS"), said.buffer_device) is not None:
            continue  # far away, or said already with its cause
        for road in said.roads:
            if road.operation == "write" and _falls_back(road):
                yield fallback(
                    f"prefill worker {worker.name} sends KV within its host over {road.transport}",
                    (
                        f"UCX: {road.scope} {road.operation} of {road.memory} memory by {road.transport}",
                        f"on the same host: {', '.join(near)}",
                        *_figures(evidence, {worker.name}),
                    ),
                    gpu=road.memory == "cuda",
                )


def complaints(evidence: Evidence) -> Iterator[Finding]:
    """What UCX itself has warned of."""
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
            "UCX has warned of something",
            "it may be long ago: a peer that was ended is an error to it, too",
            "",
            lines,
        )


def fallback(what: str, evidence: tuple[str, ...], *, gpu: bool) -> Finding:
    """UCX takes TCP although nothing was set wrongly."""
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


def _falls_back(road: Road) -> bool:
    """Whether this is not what workers of one host should use."""
    if road.scope != "intra-node":
        return False
    return "cuda_ipc" not in road.transport if road.memory == "cuda" else road.over_tcp
