"""The command line and environment of vLLM servers as workers (``kvbelt up --engine vllm``).

They get the same YAML files as embedded workers, through ``LMCACHE_CONFIG_FILE``. Each has its own process group; its
command line shows its role (``kv_producer`` is prefill, ``kv_consumer`` decode).
"""

import json
import math
import os
import sys
from pathlib import Path

from kvbelt.settings import CONFIG_VARIABLE

_KV_ROLE = {"prefill": "kv_producer", "decode": "kv_consumer"}


def vllm_argv(
    role: str,
    *,
    python: Path | None,
    model: Path,
    host: str,
    port: int,
    dtype: str,
    max_model_len: int | None,
    served_name: str | None = None,
) -> tuple[str, ...]:
    """One server's command line; ``role`` is ``prefill``, ``decode`` or ``both`` (an aggregated server)."""
    argv = [str(python or sys.executable), "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    # The first name is the one that answers carry.
    names = dict.fromkeys([served_name or model.name, model.name])
    argv += ["--host", host, "--port", str(port), "--dtype", dtype, "--served-model-name", *names]
    argv += ["--enable-prompt-tokens-details"]  # the proxy learns from them what the server holds
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
    *,
    python: Path | None = None,
    config: Path | None,
    device: str,
    threads: int,
    place: int,
    cores: int,
    kv_gb: float | None,
    api_key: str | None = None,
) -> dict[str, str]:
    """One server's environment. On CPU it gets its own cores, by its index among the workers."""
    env = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if python is not None:
        # As if its environment were active: vLLM runs compilers that lie beside its Python.
        env["PATH"] = os.pathsep.join([str(python.parent), os.environ.get("PATH", os.defpath)])
    if config is not None:
        env[CONFIG_VARIABLE] = str(config)
    if api_key is not None:
        env["VLLM_API_KEY"] = api_key  # a command line can be read by every user
    if device == "cpu":
        first = place * threads % cores
        last = min(first + threads, cores) - 1
        env["VLLM_CPU_OMP_THREADS_BIND"] = str(first) if first == last else f"{first}-{last}"
        # vLLM would take half of the machine's memory; this setting is in whole GiB.
        env["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, math.ceil(kv_gb or 1.0)))
    return env
