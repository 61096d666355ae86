"""What ``kvbelt up`` checks before it makes or starts anything. Each check takes milliseconds and imports no torch."""

import importlib.util
import json
import math
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from kvbelt.engine.unsupported import unsupported
from kvbelt.errors import StartError
from kvbelt.ops.model_dir import PARAMETERS
from kvbelt.ops.processes import GIB, DeploymentSpec, cpu_cores, resolve_device, visible_gpus

#: What a worker of the embedded engine holds beside weights and KV, in bytes: torch, transformers and NIXL.
_WORKER_BYTES = 350_000_000

_WEIGHTS = ("*.safetensors", "*.bin")
_STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def require_device(device: str, torch: str | None = None) -> None:
    """Refuse ``--device cuda`` where it cannot work.

    Args:
        device: the option's value.
        torch: torch's version where the workers run; None: in this environment.

    Raises:
        StartError: there is no GPU, or torch is a CPU build.
    """
    if device != "cuda":
        return
    if not visible_gpus():
        raise StartError(
            "--device cuda: no GPU is visible (/dev/nvidia0, CUDA_VISIBLE_DEVICES); --device cpu serves without one"
        )
    try:
        torch = torch or metadata.version("torch")
    except metadata.PackageNotFoundError:
        return
    if torch.endswith("+cpu"):
        raise StartError(
            f"--device cuda: torch {torch} is a build without CUDA; install torch from PyPI, or take --device cpu"
        )


def require_model(folder: Path, engine: str) -> None:
    """Refuse a model that the embedded engine cannot serve, as far as its config.json shows it.

    Raises:
        StartError: the message names the model's type.
    """
    if engine != "embedded":
        return
    config = _config_of(folder)
    kind = config.get("model_type")
    if isinstance(kind, str) and not _known(kind):
        raise StartError(
            f"--model {folder}: transformers {metadata.version('transformers')} knows no model type {kind!r}; "
            "--engine vllm may serve it"
        )
    text = config.get("text_config")
    problem = unsupported(config.get, text.get if isinstance(text, Mapping) else config.get)
    if problem is not None:
        raise StartError(f"--model {folder}: {problem}; --engine vllm may serve it")


def require_memory(spec: DeploymentSpec, weights: int, available: int | None = None) -> str | None:
    """Refuse workers on the CPU whose weights alone exceed the free memory.

    Args:
        spec: the deployment; its model need not be there yet.
        weights: bytes of the model's weights in each worker.
        available: free bytes; None: this machine's.

    Returns:
        A warning if there is too little for their KV; None if there is enough.

    Raises:
        StartError: the message has both sizes.
    """
    if resolve_device(spec.device) != "cpu" or spec.places:
        return None
    free = _available() if available is None else available
    workers = spec.topology.workers
    each = _WORKER_BYTES + weights
    if workers * each > free:
        raise StartError(
            f"{workers} workers need {workers * each / 1e9:.1f} GB for the model alone, and {free / 1e9:.1f} GB of "
            f"memory are free; start fewer workers, or take --dtype bfloat16"
        )
    whole = workers * (each + int(spec.kv_gb * 1e9 if spec.kv_gb is not None else GIB))
    if whole > free:
        return (
            f"with full KV memory {workers} workers need {whole / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
            "--kv-gb N gives each less"
        )
    return None


def crowded(spec: DeploymentSpec) -> str | None:
    """A warning about workers that share a core or a GPU; None: each has its own."""
    workers = spec.topology.workers
    if resolve_device(spec.device) == "cuda":
        gpus = len(visible_gpus())
        return f"{workers} workers share {_count(gpus, 'GPU')}" if 0 < gpus < workers else None
    cores = cpu_cores()
    return f"{workers} workers share {_count(cores, 'CPU core')}; all will be slow" if cores < workers else None


def own_weight_bytes(name: str, dtype: str) -> int | None:
    """As ``weight_bytes``, of a model that kvbelt makes itself; None: it is another one."""
    parameters = PARAMETERS.get(name)
    return None if parameters is None else parameters * _STORED_BYTES[dtype]


def weight_bytes(folder: Path, dtype: str) -> int:
    """Bytes of a model's weights in memory; 0 if its folder has no weights."""
    stored = 0
    for pattern in _WEIGHTS:
        stored = sum(file.stat().st_size for file in folder.glob(pattern))
        if stored:
            break
    config = _config_of(folder)
    name = str(config.get("dtype") or config.get("torch_dtype") or "")
    return math.ceil(stored * _STORED_BYTES.get(dtype, 4) / _STORED_BYTES.get(name, 4))


def _config_of(folder: Path) -> Mapping[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _known(kind: str) -> bool:
    """Whether transformers names a model type. Its tables are read as text, because to import them takes a second."""
    found = importlib.util.find_spec("transformers")
    if found is None or not found.submodule_search_locations:
        return True
    tables = list(Path(found.submodule_search_locations[0]).glob("models/auto/*.py"))
    return not tables or any(f'"{kind}"' in table.read_text(encoding="utf-8") for table in tables)


def _available() -> int:
    """Free bytes of memory, of the machine and of this control group."""
    free = int(_field(Path("/proc/meminfo"), "MemAvailable:") or 1 << 40) * 1024
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else min(free, limit - used)


def _field(file: Path, name: str) -> str | None:
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((line.split()[1] for line in lines if line.startswith(name)), None)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):  # there is no limit, or no control group
        return None


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
