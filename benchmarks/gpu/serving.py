"""Serving on several GPUs: vLLM aggregated, vLLM with NixlConnector, and vLLM with kvbelt, under the same load.

    python -m benchmarks.gpu.serving run --model DIR --system kvbelt --system nixl --system aggregated
    python -m benchmarks.gpu.serving table

``run`` starts one system after another, warms it, loads it with vLLM's own ``vllm bench serve`` at each rate, and
writes one JSON file a system; ``table`` puts the files side by side. Every system gets the same model, seeds,
arguments and clients, CUDA graphs on and prefix caching off.

* aggregated: as many plain servers, requests in turn (kvbelt's proxy without prefill workers: it relays bytes).
* nixl: NixlConnector behind the proxy of ``nixl_proxy.py``.
* kvbelt: KVBeltConnector behind kvbelt's proxy.

``--shape 2p2d`` takes four GPUs. ``--gpus 0,0`` puts both servers on one GPU: that tells whether answers are right and,
with ``--trace``, where the time between first and second token goes; it tells nothing about speed under load.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu._servers import FRONT, NAME, Plan, Processes, get, places, start_system

SYSTEMS = ("aggregated", "nixl", "kvbelt")


def bench(plan: Plan, folder: Path, tag: str, *, rate: float, prompts: int, seed: int) -> dict[str, Any]:
    """One run of vLLM's client; returns what it saved."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai",
        "--base-url", f"http://127.0.0.1:{FRONT}", "--endpoint", "/v1/completions", "--model", str(plan.model),
        "--served-model-name", NAME, "--dataset-name", "random", "--random-input-len", str(plan.input_len),
        "--random-output-len", str(plan.output_len), "--num-prompts", str(prompts), "--request-rate", str(rate),
        "--burstiness", "100", "--ignore-eos", "--temperature", "0", "--seed", str(seed), "--disable-tqdm",
        "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99",
        "--save-result", "--save-detailed", "--result-dir", str(folder), "--result-filename", f"{tag}.json",
    ]  # fmt: skip
    with (folder / f"{tag}.log").open("wb") as log:
        status = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        ).returncode
    if status != 0:
        raise SystemExit(f"vllm bench serve ended with status {status}:\n{(folder / f'{tag}.log').read_text()[-3000:]}")
    return dict(json.loads((folder / f"{tag}.json").read_text()))


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST to a completions endpoint.

    Raises:
        OSError: no answer, or a status other than 200.
    """
    data = json.dumps({"model": NAME, "temperature": 0, "return_token_ids": True, "ignore_eos": True} | body).encode()
    request = urllib.request.Request(url + "/v1/completions", data, {"content-type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310 -- our own servers
        return dict(json.loads(answer.read()))


def verify(plan: Plan) -> list[dict[str, Any]]:
    """Continue prompts on decode from prefill's KV, and again without it.

    The two differ by rounding: one computes the last prompt token with the rest, the other by itself. ``control`` is
    what a difference would look like: the same first token after a prompt of which the first tenth is another.
    """
    prefill, decode = (side[0].url for side in places(plan))
    who = post(decode, {"prompt": [1], "max_tokens": 1, "kv_transfer_params": {"kvbelt": "describe"}})
    receiver = who["kv_transfer_params"]["receiver"]
    found: list[dict[str, Any]] = []
    for number, share in enumerate((0.01, 0.1, 0.5, 1.0)):
        size = max(3, int(plan.input_len * share))
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
    """Per sample: utilisation (%) and used memory (MiB) of each GPU, twice a second while the block runs."""
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
    """By GPU: mean utilisation, most memory."""
    found: dict[str, Any] = {}
    for index in sorted({int(sample[0]) for sample in samples}):
        own = [sample for sample in samples if int(sample[0]) == index]
        found[str(index)] = {
            "utilisation": sum(sample[1] for sample in own) / len(own),
            "memory_mib": max(sample[2] for sample in own),
        }
    return found


def one_run(plan: Plan, logs: Path, system: str, rate: float, seed: int) -> dict[str, Any]:
    """One load of one system."""
    prompts = max(plan.min_prompts, round(plan.seconds * rate))
    with utilisation(plan.device) as samples:
        saved = bench(plan, logs, f"rate-{rate:g}-{seed}", rate=rate, prompts=prompts, seed=seed)
    saved.pop("generated_texts", None)
    run = {"rate": rate, "prompts": prompts, "gpus": mean_utilisation(samples), "bench": saved}
    if system == "kvbelt":
        # The newest first; the proxy tells a hundred.
        requests = json.loads(get(f"http://127.0.0.1:{FRONT}/kvbelt/requests"))["requests"][:prompts]
        run["requests"] = requests
        run["paths"] = Counter(request["decision"]["path"] for request in requests)
    return run


def own_metrics(url: str) -> list[str]:
    """What a server's /metrics say of the belt."""
    lines = get(url + "/metrics").decode().splitlines()
    return [line for line in lines if line.startswith("kvbelt_") and "_bucket" not in line]


def run_system(plan: Plan, system: str) -> None:
    """Start, warm, load at each rate, write, end."""
    logs = plan.out / "logs" / system
    logs.mkdir(parents=True, exist_ok=True)
    processes = Processes(logs)
    result: dict[str, Any] = {"system": system, "versions": versions(plan.device), "plan": _plain(plan), "runs": []}
    began = time.monotonic()
    try:
        start_system(plan, processes, system)
        result["start_seconds"] = time.monotonic() - began
        print(f"{system}: up after {result['start_seconds']:.0f} s", flush=True)
        # Both servers, every connection, and the shapes of the load.
        bench(plan, logs, "warm", rate=4, prompts=8, seed=1)
        if system == "kvbelt":
            result["verified"] = verify(plan)
            print(f"verified: {result['verified']}", flush=True)
        for repetition in range(plan.repetitions):
            for number, rate in enumerate(plan.rates):
                run = one_run(plan, logs, system, rate, seed=100 + number + 1000 * repetition)
                result["runs"].append(run)
                print(line_of(system, run), flush=True)
        if plan.trace:
            result["traces"] = {path.stem: path.read_text().splitlines() for path in logs.glob("*.trace")}
        if system == "kvbelt":
            result["worker_metrics"] = {place.port: own_metrics(place.url) for side in places(plan) for place in side}
    finally:
        processes.stop()
        (plan.out / f"{system}.json").write_text(json.dumps(result))


def _plain(plan: Plan) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, Path) else value
        for name in plan.__slots__
        for value in [getattr(plan, name)]
    }


def versions(device: str) -> dict[str, Any]:
    """Of what the figures depend on."""
    import torch  # noqa: PLC0415 -- seconds

    import vllm  # noqa: PLC0415 -- seconds

    found: dict[str, Any] = {"vllm": vllm.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found["gpus"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    return found


HEAD = (
    "system", "rate", "done", "TTFT p50", "p99", "TPOT p50", "ITL p50", "p99", "gap 2 p50", "tok/s", "exposed p50",
    "p99", "GPU %", "paths",
)  # fmt: skip


def cells(system: str, run: dict[str, Any]) -> list[str]:
    """One row; ``gap 2`` is from the first token to the second, ``exposed`` from the end of prefill to the commit."""
    saved = run["bench"]
    exposed = sorted(
        request["transfer"]["exposed_ms"]
        for request in run.get("requests", [])
        if request["transfer"] and request["transfer"]["state"] == "done"
    )
    busy = "/".join(f"{gpu['utilisation']:.0f}" for gpu in run["gpus"].values()) or "-"
    figures = [saved[name] for name in ("p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p50_itl_ms", "p99_itl_ms")]
    done = f"{saved['completed']}/{run['prompts']}"
    ends = [f"{exposed[len(exposed) // 2]:.1f}", f"{exposed[-1 - len(exposed) // 100]:.1f}"] if exposed else ["-", "-"]
    total = f"{saved['total_token_throughput']:,.0f}"
    gaps = [gaps[0] * 1000 for gaps in saved["itls"] if gaps]
    figures.append(statistics.median(gaps) if gaps else float("nan"))
    paths = " ".join(f"{path}:{count}" for path, count in run.get("paths", {}).items()) or "-"
    return [system, f"{run['rate']:g}", done, *(f"{value:.1f}" for value in figures), total, *ends, busy, paths]


def line_of(system: str, run: dict[str, Any]) -> str:
    """One row, as it is measured."""
    return "| " + " | ".join(f"{name} {cell}" for name, cell in zip(HEAD, cells(system, run), strict=True)) + " |"


def print_table(out: Path) -> None:
    """All systems that have been run, side by side; milliseconds."""
    print("| " + " | ".join(HEAD) + " |")
    print("|" + "---|" * len(HEAD))
    for system in SYSTEMS:
        path = out / f"{system}.json"
        for run in json.loads(path.read_text())["runs"] if path.exists() else []:
            print("| " + " | ".join(cells(system, run)) + " |")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--system", action="append", choices=SYSTEMS)
    parser.add_argument("--model", type=Path, default=Path("/tmp/llama8b"))  # noqa: S108 -- a default for a bare machine
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rate", action="append", type=float)
    parser.add_argument("--input-len", type=int, default=7500)
    parser.add_argument("--output-len", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=50.0, help="of load at each rate")
    parser.add_argument("--min-prompts", type=int, default=50)
    parser.add_argument("--buffer-gb", type=float, default=4.0)
    parser.add_argument("--ready-seconds", type=float, default=400.0)
    parser.add_argument("--shape", default="1p1d", metavar="XpYd")
    parser.add_argument("--gpus", default="", help="one a server, prefill first: 0,1; 0,0 puts both on one")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument(
        "--kv", action="append", default=[], metavar="KEY=VALUE", help="a setting of kvbelt's connector"
    )
    parser.add_argument("--trace", action="store_true", help="note when each hook of the connector is called")
    parser.add_argument("--server", action="append", default=[], metavar="ARGUMENT", help="one more for every server")
    args = parser.parse_args()
    if args.what == "table":
        print_table(args.out)
        return
    defaults = ["--load-format", "dummy", "--max-model-len", "9000", "--gpu-memory-utilization", "0.8"]
    if args.device == "cpu":
        defaults = ["--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"]
    args.out.mkdir(parents=True, exist_ok=True)
    shape = re.fullmatch(r"(\d+)p(\d+)d", args.shape)
    if shape is None:
        parser.error(f"--shape is {args.shape!r}; give it as 1p1d or 2p2d")
    gpus = [int(gpu) for gpu in args.gpus.split(",")] if args.gpus else []
    extra = dict(pair.partition("=")[::2] for pair in args.kv)
    plan = Plan(
        args.model, args.out, args.device, args.rate or [1.0, 4.0], args.input_len, args.output_len, args.seconds,
        args.min_prompts, defaults + args.server, int(args.buffer_gb * (1 << 30)), args.ready_seconds,
        int(shape[1]), int(shape[2]), gpus, args.repetitions, extra, args.trace,
    )  # fmt: skip
    for system in args.system or SYSTEMS:
        run_system(plan, system)
    print_table(args.out)


if __name__ == "__main__":
    main()
