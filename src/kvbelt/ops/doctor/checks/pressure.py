"""What runs out: the host's CPU and memory, the proxy's core, a decode worker's KV memory; and refused messages."""

from collections.abc import Iterator

from kvbelt.metrics.thresholds import KV_FREE_RATIO
from kvbelt.ops.doctor.evidence import Evidence, WorkerSeen
from kvbelt.ops.doctor.finding import Finding, Severity

#: A busier host has no CPU left for a worker that needs some.
CPU_FULL = 0.9
#: With a smaller share left, the kernel takes memory back from what runs, or ends it.
MEMORY_LEFT = 0.05
#: Of one core. Above, the proxy is the bottleneck.
PROXY_BUSY = 0.9
#: As the alerts: of a second.
_PREEMPTIONS = 0.1
_REFUSED = 1.0


def cpu(evidence: Evidence) -> Iterator[Finding]:
    """A host without CPU to spare makes everything on it late."""
    host, here = evidence.host, evidence.here()
    if host is None or not here or host.cpu_used < CPU_FULL:
        return
    yield Finding(
        "cpu_full",
        Severity.WARNING,
        f"the CPU of this host is {host.cpu_used:.0%} busy: {len(here)} workers share {host.cores} cores",
        "workers on the CPU compute with it, and every process needs some to send, receive and answer: first tokens "
        "and transfers are late whatever else is right",
        "fewer workers on this host, or more cores; end what else runs here (top); a GPU for the workers. Threads of "
        "all workers together should not be more than the cores: --threads",
        (
            f"busy {host.cpu_used:.0%} of {evidence.seconds:.0f} s, load {host.load:.1f} on {host.cores} cores",
            f"on this host: {', '.join(f'{worker.role} {worker.name}' for worker in here)}",
        ),
    )


def memory(evidence: Evidence) -> Iterator[Finding]:
    """A host without memory to spare ends its processes soon."""
    host, here = evidence.host, evidence.here()
    if host is None or not here or not host.memory_bytes or host.memory_free > MEMORY_LEFT * host.memory_bytes:
        return
    yield Finding(
        "memory_full",
        Severity.WARNING,
        f"this host has {host.memory_free / 1e9:.1f} of {host.memory_bytes / 1e9:.1f} GB of memory left",
        "the kernel reads code and models from the disk again and again, and at last ends a process: a worker is lost",
        f"fewer workers on this host ({len(here)} run here), less KV memory each (--kv-gb), or smaller buffers "
        "(--buffer-gb)",
        (f"available: {host.memory_free:,} bytes",),
    )


def proxy(evidence: Evidence) -> Iterator[Finding]:
    """A proxy that has no time left on its core."""
    if not evidence.counted_seconds:
        return
    used = evidence.proxy_counted.cpu_seconds / evidence.counted_seconds
    if used > PROXY_BUSY:
        yield Finding(
            "proxy_busy",
            Severity.WARNING,
            f"the proxy uses {used:.0%} of a core: it is the bottleneck",
            "it works on one core, and requests wait for it",
            "run a second proxy over the same workers, and share the clients between the two",
            (f"process_cpu_seconds_total grew by {evidence.proxy_counted.cpu_seconds:.1f}",),
        )


def kv_memory(evidence: Evidence) -> Iterator[Finding]:
    """KV blocks that have run out, or that were taken away from requests."""
    full = [worker for worker in evidence.of("decode") if worker.samples and _left(worker) < KV_FREE_RATIO]
    for worker in full:
        yield Finding(
            "kv_full",
            Severity.WARNING,
            f"decode worker {worker.name} has {_left(worker):.0%} of its KV blocks left",
            "requests wait for memory, or computed KV is thrown away",
            "more KV memory (--kv-gb; vLLM: --gpu-memory-utilization), or more decode workers",
            (f"{worker.samples[-1].blocks_free} of {worker.samples[-1].blocks_total} blocks are free",),
        )
    seconds = evidence.counted_seconds
    evicting = [one for one in evidence.workers if seconds and one.counted.preemptions / seconds > _PREEMPTIONS]
    if evicting:
        yield Finding(
            "preemptions",
            Severity.WARNING,
            f"{' and '.join(worker.name for worker in evicting)} throw away computed KV, because memory is short",
            "those requests are computed again",
            "more KV memory (--kv-gb; vLLM: --gpu-memory-utilization), fewer requests at once (--max-running; vLLM: "
            "--max-num-seqs), or more workers",
            tuple(f"{one.name}: {one.counted.preemptions:g} preemptions in {seconds:.0f} s" for one in evicting),
        )


def _left(worker: WorkerSeen) -> float:
    shares = sorted(one.blocks_free / one.blocks_total for one in worker.samples if one.blocks_total)
    return shares[len(shares) // 2] if shares else 1.0


def refused(evidence: Evidence) -> Iterator[Finding]:
    """Control sockets that refuse messages all the time."""
    seconds = evidence.counted_seconds
    counts = {worker.name: worker.counted.refused for worker in evidence.workers}
    counts["the proxy"] = evidence.proxy_counted.refused
    found = {name: count for name, count in counts.items() if seconds and count / seconds > _REFUSED}
    if found:
        yield Finding(
            "refused_messages",
            Severity.WARNING,
            f"{' and '.join(found)} refuse messages on their control sockets",
            "a process that is not trusted sends them, or one with a wrong key or of another version",
            "kvbelt_refused_messages_total and kvbelt_transfers_ended_total have the reasons; docs/security.md has the "
            "keys. Close the ports to hosts outside the deployment",
            tuple(f"{name}: {count:g} in {seconds:.0f} s" for name, count in found.items()),
        )
