"""1p1d with two servers that differ: every byte of KV compared, and answers with the decode server's own.

    python benchmarks/gpu/dummy_model.py /tmp/small --small
    python -m benchmarks.gpu.pairs --model /tmp/small --gpus 0,0 [--pair 16-to-64 …]

All pairs start at once, on one GPU or on two. ``pd_verify: always`` compares a digest of all bytes of each transfer.
Prompts of many lengths go through the proxy, eight at a time, and then to the decode server without KV.
``one_gpu.py`` says how two ranks share a GPU.
"""

import argparse
import contextlib
import json
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu._facts import own_metrics, versions
from benchmarks.gpu._servers import NAME, Front, Place, Plan, Processes, server, start_front, wait_for

LENGTHS = (3, 16, 17, 63, 64, 65, 250, 750, 1023, 2048, 3750, 7500)
ANSWER_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Pair:
    """What the two servers are given."""

    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()


FP8 = ("--kv-cache-dtype", "fp8")
EXACT = ("--dtype", "float32", "--attention-backend", "TRITON_ATTN")
TWO = ("--tensor-parallel-size", "2", "--distributed-executor-backend", "mp", "--disable-custom-all-reduce")

PAIRS = {
    "equal": Pair(),
    "fp8": Pair(FP8, FP8),
    "16-to-64": Pair(("--block-size", "16"), ("--block-size", "64")),
    "64-to-16": Pair(("--block-size", "64"), ("--block-size", "16")),
    # In float32 two degrees round alike but for the last bits, so that answers can be compared as well.
    "tp2-to-1": Pair((*TWO, *EXACT), EXACT),
    "tp1-to-2": Pair(EXACT, (*TWO, *EXACT)),
}


def ask(port: int, prompt: list[int]) -> tuple[list[int], str]:
    """The tokens of an answer, and ``x-kvbelt-path``.

    Raises:
        OSError: no answer, or a status other than 200.
    """
    body = {"model": NAME, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0}
    data = json.dumps(body | {"return_token_ids": True, "ignore_eos": True}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", data, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=180) as answer:  # noqa: S310 -- our own servers
        found = json.loads(answer.read())
        return found["choices"][0]["token_ids"], str(answer.headers.get("x-kvbelt-path", ""))


def prompts_of(rounds: int, longest: int) -> list[list[int]]:
    """The same at every call."""
    lengths = [length for length in LENGTHS if length <= longest] * rounds
    return [
        [3 + (number * 7919 + place * 104_729) % 40_000 for place in range(length)]
        for number, length in enumerate(lengths)
    ]


class Running:
    """One pair of servers and their proxy."""

    def __init__(self, name: str, number: int, args: argparse.Namespace) -> None:
        self.name, self.pair = name, PAIRS[name]
        self.prefill = Place(0, args.gpus[0], 7100 + 2 * number, 0)
        self.decode = Place(1, args.gpus[-1], 7101 + 2 * number, 0)
        self.front = Front(f"{name}-proxy", 9100 + number, 7500 + number, [self.prefill], [self.decode])
        self.plan = Plan(
            model=args.model, out=args.out, device=args.device, rates=[], input_len=0, output_len=0, seconds=0,
            min_prompts=0, server_arguments=[], buffer_bytes=1 << 30, ready_seconds=args.ready_seconds,
            gpus=args.gpus, environment={"VLLM_DISABLE_PYNCCL": "1"},
        )  # fmt: skip

    def start(self, args: argparse.Namespace, processes: Processes) -> None:
        usual = ["--max-model-len", str(args.longest + 64), "--max-num-seqs", "16", "--enforce-eager"]
        if args.device == "cuda":
            usual += ["--max-num-batched-tokens", "2048", "--gpu-memory-utilization", "0.1"]
            usual += ["--kv-cache-memory-bytes=3000000000"]
        else:
            usual += ["--dtype", "float32"]
        extra = {"pd_buffer_size": 1 << 30, "pd_proxy_host": "127.0.0.1", "pd_proxy_port": self.front.notify}
        if args.device == "cpu":
            extra["pd_buffer_size"] = 1 << 26
        for role, place, own in (
            ("producer", self.prefill, self.pair.prefill),
            ("consumer", self.decode, self.pair.decode),
        ):
            self.plan.server_arguments = [*usual, *own]
            if "2" in own and len(set(args.gpus)) == 1 and args.device == "cuda":
                self.plan.server_arguments += ["--worker-cls", "benchmarks.gpu.one_gpu.Worker"]
            kv = {"kv_connector": "KVBeltConnector", "kv_connector_module_path": "kvbelt.vllm", "kv_role": f"kv_{role}"}
            more: dict[str, Any] = {"kv_connector_extra_config": extra | {"pd_verify": "always"}}
            server(self.plan, processes, f"{self.name}-{role}", place, kv | more)

    def measure(self, args: argparse.Namespace, processes: Processes) -> dict[str, Any]:
        """Ask over the belt and each server alone, and compare."""
        for place in (self.prefill, self.decode):
            wait_for(place.url + "/health", processes, args.ready_seconds)
        start_front(processes, "kvbelt", self.front, ("--placement", "split", "--slo-itl-ms", "0"))
        prompts = prompts_of(args.rounds, args.longest)
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda prompt: ask(self.front.port, prompt), prompts))
            alone = list(threads.map(lambda prompt: ask(self.decode.port, prompt)[0], prompts))
            other = list(threads.map(lambda prompt: ask(self.prefill.port, prompt)[0], prompts))
        one_by_one = [ask(self.decode.port, prompt)[0] for prompt in prompts]
        crossed = [tokens for tokens, _ in answers]
        return {
            "pair": self.name,
            "prompts": len(prompts),
            "paths": Counter(path.partition(" ")[0] for _, path in answers),
            "other_ways": [path for _, path in answers if "first-token" not in path][:3],
            # Equal to the decode server's own; of the answers over the belt, of the prefill server's own, and of the
            # decode server's when it is asked for one at a time.
            "equal": sum(a == b for a, b in zip(crossed, alone, strict=True)),
            "equal_of_prefill": sum(a == b for a, b in zip(other, alone, strict=True)),
            "equal_one_by_one": sum(a == b for a, b in zip(one_by_one, alone, strict=True)),
            "distinct": len({tuple(tokens) for tokens in crossed}),
            "metrics": {
                role: own_metrics(place.url) for role, place in (("prefill", self.prefill), ("decode", self.decode))
            },
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gpus", default="0,1", type=lambda text: [int(each) for each in text.split(",")])
    parser.add_argument("--pair", action="append", choices=tuple(PAIRS))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--longest", type=int, default=7500)
    parser.add_argument("--ready-seconds", type=float, default=300.0)
    args = parser.parse_args()
    logs = args.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    began, lock = time.monotonic(), threading.Lock()
    results: dict[str, Any] = {"versions": versions(args.device), "pairs": []}
    running = [Running(name, number, args) for number, name in enumerate(args.pair or PAIRS)]

    def one(each: Running) -> None:
        try:
            found = each.measure(args, processes_of[each.name])
        except (SystemExit, OSError) as error:
            found = {"pair": each.name, "failed": str(error)}
        with lock:
            found["seconds"] = time.monotonic() - began
            results["pairs"].append(found)
            (args.out / "pairs.json").write_text(json.dumps(results))
            print({key: value for key, value in found.items() if key != "metrics"}, flush=True)

    processes_of = {each.name: Processes(logs) for each in running}
    try:
        for each in running:
            each.start(args, processes_of[each.name])
        with ThreadPoolExecutor(len(running)) as threads:
            list(threads.map(one, running))
    finally:
        for own in processes_of.values():
            with contextlib.suppress(OSError):
                own.stop()


if __name__ == "__main__":
    main()
