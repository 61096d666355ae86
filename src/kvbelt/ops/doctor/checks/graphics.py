"""GPU utilisation against the prefill queue."""

from collections.abc import Iterable, Iterator

from kvbelt.metrics.thresholds import QUEUE
from kvbelt.ops.doctor.evidence import Evidence, GpuSeen
from kvbelt.ops.doctor.finding import Finding, Severity

#: The seed's thresholds, while prompts wait.
IDLE_PERCENT = 50.0
FULL_PERCENT = 90.0


def utilisation(evidence: Evidence) -> Iterator[Finding]:
    """The GPUs of the doctor's host."""
    if evidence.proxy_answer:
        return
    on_cuda = [w for w in evidence.workers if w.about is not None and w.about.device.startswith("cuda")]
    if evidence.gpus is None:
        where = (
            "the workers' GPUs are on other hosts: run kvbelt doctor or nvidia-smi there"
            if on_cuda
            else "the workers compute on CPUs"
        )
        yield no_gpu(where)
        return
    waiting = sum(worker.waiting for worker in evidence.of("prefill"))
    lines = lines_of(evidence.gpus)
    busiest = max(gpu.utilisation for gpu in evidence.gpus)
    if waiting > QUEUE and busiest < IDLE_PERCENT:
        yield Finding(
            "gpu_idle",
            Severity.WARNING,
            f"{waiting:g} prompts wait while no GPU of this host is busy for more than {IDLE_PERCENT:g} % of the time",
            "something other than computing limits prefill",
            "add prefill workers (kvbelt workers add prefill HOST:7100), or let each take more tokens a step: "
            "--max-batch-tokens (vLLM: --max-num-batched-tokens)",
            lines,
        )
    elif waiting > QUEUE and busiest > FULL_PERCENT:
        yield Finding(
            "gpu_full",
            Severity.WARNING,
            f"{waiting:g} prompts wait and the GPUs are busy all the time",
            "computing is the limit: the model is large for these GPUs",
            "more or faster GPUs for prefill, tensor parallelism (vLLM: --tensor-parallel-size), a smaller or "
            "quantised model",
            lines,
        )
    else:
        yield Finding(
            "gpus", Severity.NOTE, f"{len(evidence.gpus)} GPUs on this host", "they are not the bottleneck", "", lines
        )


def no_gpu(consequence: str) -> Finding:
    why = f"nvidia-smi is missing or shows none; {consequence}"
    return Finding("no_gpu", Severity.NOTE, "no GPU", why, "")


def lines_of(gpus: Iterable[GpuSeen]) -> tuple[str, ...]:
    return tuple(f"GPU {g.index} {g.name}: busy {g.utilisation:.0f} %, memory {g.memory_used:.0%}" for g in gpus)
