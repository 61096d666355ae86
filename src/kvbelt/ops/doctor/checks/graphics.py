"""Do the GPUs work, and not too much?"""

from collections.abc import Iterator

from kvbelt.ops.doctor.checks.capacity import QUEUE
from kvbelt.ops.doctor.evidence import Evidence, GpuSeen
from kvbelt.ops.doctor.finding import Finding, Severity

#: The seed's thresholds, for prompts that wait.
IDLE_PERCENT = 50.0
FULL_PERCENT = 90.0


def utilisation(evidence: Evidence) -> Iterator[Finding]:
    """GPU utilisation on the doctor's own host, against the prefill queue."""
    if evidence.proxy_answer:
        return
    on_cuda = [w for w in evidence.workers if w.about is not None and w.about.device.startswith("cuda")]
    if evidence.gpus is None:
        where = (
            "the workers compute on GPUs of other hosts: run kvbelt doctor, or nvidia-smi, there"
            if on_cuda
            else "the workers compute on CPUs"
        )
        yield Finding("no_gpu", Severity.NOTE, "no GPU", f"nvidia-smi is not here, or shows none; {where}", "")
        return
    waiting = sum(worker.waiting for worker in evidence.of("prefill"))
    lines = tuple(_line(gpu) for gpu in evidence.gpus)
    busiest = max(gpu.utilisation for gpu in evidence.gpus)
    if waiting > QUEUE and busiest < IDLE_PERCENT:
        yield Finding(
            "gpu_idle",
            Severity.WARNING,
            f"{waiting:g} prompts wait while no GPU of this host is busy for more than {IDLE_PERCENT:g} % of the time",
            "prompts wait for something else than computing",
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
            "gpus", Severity.NOTE, f"{len(evidence.gpus)} GPUs on this host", "nothing waits because of them", "", lines
        )


def _line(gpu: GpuSeen) -> str:
    return f"GPU {gpu.index} {gpu.name}: busy {gpu.utilisation:.0f} %, memory {gpu.memory_used:.0%}"
