"""What is asked of the servers and the GPUs besides the load: right answers, metrics, utilisation, versions."""

import contextlib
import importlib.metadata
import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu._servers import NAME, get


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST to a completions endpoint.

    Raises:
        OSError: no answer, or a status other than 200.
    """
    data = json.dumps({"model": NAME, "temperature": 0, "return_token_ids": True, "ignore_eos": True} | body).encode()
    request = urllib.request.Request(url + "/v1/completions", data, {"content-type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310 -- our own servers
        return dict(json.loads(answer.read()))


def verify(prefill: str, decode: str, input_len: int) -> list[dict[str, Any]]:
    """Continue prompts on decode from prefill's KV, and again without it."""
    who = post(decode, {"prompt": [1], "max_tokens": 1, "kv_transfer_params": {"kvbelt": "describe"}})
    receiver = who["kv_transfer_params"]["receiver"]
    found: list[dict[str, Any]] = []
    for number, share in enumerate((0.01, 0.1, 0.5, 1.0)):
        size = max(3, int(input_len * share))
        prompt = [3 + (number * 7919 + place * 104_729) % 40_000 for place in range(size)]
        name = f"verify-{number}"
        handoff = {"transfer_id": name, "receiver": receiver, "deadline_seconds": 60}
        first = post(prefill, {"prompt": prompt, "max_tokens": 1, "kv_transfer_params": handoff})
        body = {"prompt": prompt + first["choices"][0]["token_ids"], "max_tokens": 16, "logprobs": 1}
        loaded = post(decode, body | {"kv_transfer_params": {"transfer_id": name, "deadline_seconds": 60}})
        computed = post(decode, body)
        tenth = max(1, size // 10)
        changed = [token + 1 for token in prompt[:tenth]] + body["prompt"][tenth:]
        control = post(decode, body | {"prompt": changed})
        one, other, third = (answer["choices"][0] for answer in (loaded, computed, control))
        pairs = list(zip(one["token_ids"], other["token_ids"], strict=True))
        same = next((place for place, (mine, theirs) in enumerate(pairs) if mine != theirs), len(pairs))
        logprobs = zip(
            one["logprobs"]["token_logprobs"][:same], other["logprobs"]["token_logprobs"][:same], strict=True
        )
        found.append(
            {
                "prompt_tokens": size,
                "kv": loaded["kv_transfer_params"]["kv"],
                "same_tokens": same,
                "of": len(pairs),
                "largest_logprob_difference": max((abs(mine - theirs) for mine, theirs in logprobs), default=None),
                "control_tokens_same": sum(a == b for a, b in zip(third["token_ids"], other["token_ids"], strict=True)),
                "control_first_logprob_difference": abs(
                    third["logprobs"]["token_logprobs"][0] - other["logprobs"]["token_logprobs"][0]
                ),
            }
        )
    return found


@contextlib.contextmanager
def utilisation(device: str) -> Iterator[list[list[float]]]:
    """Twice a second during the block: utilisation (%) and used memory (MiB) of each GPU."""
    samples: list[list[float]] = []
    if device != "cuda":
        yield samples
        return
    query = [
        "nvidia-smi",
        "--query-gpu=index,utilization.gpu,memory.used",
        "--format=csv,noheader,nounits",
        "-lms",
        "500",
    ]
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = process.stdout

        def read() -> None:
            samples.extend([float(part) for part in line.split(",")] for line in lines)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield samples
        finally:
            process.terminate()
            reader.join()


def mean_utilisation(samples: list[list[float]]) -> dict[str, Any]:
    """By GPU: mean utilisation and largest memory."""
    found: dict[str, Any] = {}
    for index in sorted({int(sample[0]) for sample in samples}):
        own = [sample for sample in samples if int(sample[0]) == index]
        found[str(index)] = {
            "utilisation": sum(sample[1] for sample in own) / len(own),
            "memory_mib": max(sample[2] for sample in own),
        }
    return found


def own_metrics(url: str) -> list[str]:
    """The belt's series in a server's /metrics."""
    lines = get(url + "/metrics").decode().splitlines()
    return [line for line in lines if line.startswith("kvbelt_") and "_bucket" not in line]


def versions(device: str) -> dict[str, Any]:
    """The versions that the figures depend on."""
    found: dict[str, Any] = {name: importlib.metadata.version(name) for name in ("vllm", "torch", "nixl")}
    found["python"] = sys.version.split()[0]
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found["gpus"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    return found
