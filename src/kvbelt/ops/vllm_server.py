"""vLLM servers as workers of a deployment: command line and environment of each (``kvbelt up --engine vllm``).

They get the same YAML files as kvbelt's own workers, through ``LMCACHE_CONFIG_FILE``. Each is its own process group;
its command line shows its role (``kv_producer`` is prefill, ``kv_consumer`` decode).
"""

import importlib.util
import json
import math
import sys
from pathlib import Path

from kvbelt.errors import StartError
from kvbelt.settings import CONFIG_VARIABLE

_KV_ROLE = {"prefill": "kv_producer", "decode": "kv_consumer"}


def require_vllm() -> None:
    """See that vLLM is there, before anything is started.

    Raises:
        StartError: it is not.
    """
    if importlib.util.find_spec("vllm") is None:
        raise StartError(
            f"--engine vllm needs vLLM in the environment of {sys.executable}, and it is not there; "
            "docs/vllm.md tells how to install it"
        )


def vllm_argv(
    role: str, *, model: Path, host: str, port: int, dtype: str, max_model_len: int | None
) -> tuple[str, ...]:
    """The command line of one server; ``role`` is ``prefill``, ``decode`` or ``both`` (an aggregated server)."""
    argv = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    argv += ["--host", host, "--port", str(port), "--dtype", dtype, "--served-model-name", model.name]
    if max_model_len is not None:
        argv += ["--max-model-len", str(max_model_len)]
    if role in _KV_ROLE:
        transfer = {
            "kv_connector": "KVBeltConnector",
            "kv_connector_module_path": "kvbelt.vllm",
            "kv_role": _KV_ROLE[role],
        }
        argv += ["--kv-transfer-config", json.dumps(transfer)]
    return tuple(argv)


def vllm_env(
    *, config: Path | None, device: str, threads: int, place: int, cores: int, kv_gb: float | None
) -> dict[str, str]:
    """What a server needs in its environment. On CPU: which cores are its own, by its place among the workers."""
    env = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if config is not None:
        env[CONFIG_VARIABLE] = str(config)
    if device == "cpu":
        first = place * threads % cores
        last = min(first + threads, cores) - 1
        env["VLLM_CPU_OMP_THREADS_BIND"] = str(first) if first == last else f"{first}-{last}"
        # vLLM would take half of the machine's memory; it counts in whole GiB.
        env["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, math.ceil(kv_gb or 1.0)))
    return env
