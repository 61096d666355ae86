"""The utilisation of this host's GPUs, from ``nvidia-smi``."""

import asyncio
import contextlib
import shutil
from collections import defaultdict
from collections.abc import Sequence

from kvbelt.ops.doctor.evidence import GpuSeen

_QUERY = "index,uuid,name,utilization.gpu,memory.used,memory.total"
_SECONDS = 10.0


async def sample(times: int, pause: float) -> tuple[GpuSeen, ...] | None:
    """The mean of ``times`` samples of each GPU; None without a GPU or nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    samples = []
    for number in range(times):
        if number:
            await asyncio.sleep(pause)
        samples.append(parse(await _run()))
    return mean_of(samples)


async def _run() -> str:
    try:
        process = await asyncio.create_subprocess_exec(
            "nvidia-smi",
            f"--query-gpu={_QUERY}",
            "--format=csv,noheader,nounits",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return ""
    try:
        async with asyncio.timeout(_SECONDS):
            out, _ = await process.communicate()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        return ""
    return out.decode(errors="replace")


def parse(text: str) -> list[GpuSeen]:
    """One sample. Other lines are ignored."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        try:
            index, uuid, name, used, memory, total = cells
            found.append(GpuSeen(int(index), uuid, name, float(used), float(memory) / float(total)))
        except (ValueError, ZeroDivisionError):
            continue
    return found


def mean_of(samples: Sequence[Sequence[GpuSeen]]) -> tuple[GpuSeen, ...] | None:
    """The mean of several samples, by GPU."""
    by_uuid: dict[str, list[GpuSeen]] = defaultdict(list)
    for one in samples:
        for gpu in one:
            by_uuid[gpu.uuid].append(gpu)
    if not by_uuid:
        return None
    return tuple(
        GpuSeen(
            seen[0].index,
            uuid,
            seen[0].name,
            sum(gpu.utilisation for gpu in seen) / len(seen),
            sum(gpu.memory_used for gpu in seen) / len(seen),
        )
        for uuid, seen in by_uuid.items()
    )
