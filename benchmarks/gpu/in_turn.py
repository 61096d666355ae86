"""kvbelt's 1p1d with several settings, all running on one GPU and loaded in turn.

    python -m benchmarks.gpu.in_turn --variant as-it-is --variant KVBELT_BESIDE=1 --variant pd_verify=off

For a machine with a single GPU. Prefill and decode share it, so times under load say nothing about two GPUs; but all
variants share it in the same way, only one is loaded at any moment, and rounds of all of them alternate: what differs
between them is the setting. A variant is ``pd_…=value`` (of the connector), ``NAME=value`` (of the servers'
environment: those of ``traced.py``), or a name without a value (nothing is changed). With every one the first tokens
of some prompts are compared with those of the decode server by itself.

Each server has 15 GiB of weights and is told how much KV to keep, because none can measure what is left to it; three
variants fill 140 GiB.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu._client import Client
from benchmarks.gpu._facts import own_metrics, verify, versions
from benchmarks.gpu._servers import Lane, Plan, places, start_front, start_system, whole_of
from benchmarks.gpu._table import print_table
from benchmarks.gpu.serving import Measurement

SYSTEM = "kvbelt"
GIB = 1 << 30


def plan_of(args: argparse.Namespace, number: int, variant: str) -> Plan:
    """The plan of one variant."""
    name, told, value = variant.partition("=")
    own = name.startswith("pd_")
    lane = Lane(number, len(args.variant), tuple(sorted(os.sched_getaffinity(0))), args.port_shift)
    servers = ["--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"]
    if args.device == "cuda":
        servers = ["--load-format", args.load_format, "--max-model-len", "9000", "--max-num-seqs", "16"]
        servers += ["--gpu-memory-utilization", "0.14", f"--kv-cache-memory-bytes={int(args.kv_gb * GIB)}"]
    return Plan(
        model=args.model,
        out=args.out / "".join(letter if letter.isalnum() or letter in "_.-" else "-" for letter in variant),
        device=args.device,
        rates=args.rate or [0.7, 2.0],
        input_len=args.input_len,
        output_len=args.output_len,
        seconds=args.seconds,
        min_prompts=args.min_prompts,
        server_arguments=servers,
        buffer_bytes=int(args.buffer_gb * GIB),
        ready_seconds=args.ready_seconds,
        gpus=[0, 0] if args.device == "cuda" else [],
        extra={name: value} if told and own else {},
        environment={name: value} if told and not own else {},
        trace=True,
        lane=lane,
    )


class Variant:
    """One setting: its servers, its proxy, its client."""

    def __init__(self, plan: Plan) -> None:
        self.measured = Measurement(plan, SYSTEM)
        self.client = Client(plan, self.measured.logs / "client.log", None)

    def start(self) -> None:
        """Start servers and proxy, warm them up, and check the answers."""
        measured, plan = self.measured, self.measured.plan
        start_system(plan, measured.processes, SYSTEM)
        start_front(measured.processes, SYSTEM, whole_of(plan))
        measured.result["versions"] = versions(plan.device)
        measured.result["start_seconds"] = time.monotonic() - measured.began

    def warm(self) -> None:
        """Send every shape of the load, and check the answers."""
        measured, plan = self.measured, self.measured.plan
        front = whole_of(plan)
        measured.warm(front, self.client)
        measured.result["verified"] = verify(front.prefill[0].url, front.decode[0].url, plan.input_len)
        print(f"{plan.out.name}: verified: {measured.result['verified']}", flush=True)

    def load(self, rate: float, seed: int) -> None:
        front = whole_of(self.measured.plan)
        self.measured.note(self.measured.load(front, self.client, rate, seed) | {"beside": 0})

    def end(self) -> None:
        """Keep what the servers report, and end them."""
        measured, plan = self.measured, self.measured.plan
        with contextlib.suppress(OSError):
            measured.result["worker_metrics"] = {
                place.port: own_metrics(place.url) for side in places(plan) for place in side
            }
        measured.result["traces"] = {path.stem: path.read_text().splitlines() for path in measured.logs.glob("*.trace")}
        measured.save()
        self.client.close()
        measured.processes.stop()


def medians(variant: Variant, rate: float) -> dict[str, float]:
    """Medians of one rate, in ms: gap before the second token, exposed transfer, time between tokens."""
    runs = [run for run in variant.measured.result["runs"] if run["rate"] == rate]
    gaps = [gaps[0] * 1000 for run in runs for gaps in run["bench"]["itls"] if gaps]
    between = [gap * 1000 for run in runs for gaps in run["bench"]["itls"] for gap in gaps[1:]]
    exposed = [
        request["transfer"]["exposed_ms"]
        for run in runs
        for request in run["requests"]
        if request["transfer"] and request["transfer"]["state"] == "done"
    ]
    named: dict[str, list[float]] = {"gap 2": gaps, "exposed": exposed, "ITL": between}
    return {name: statistics.median(values) for name, values in named.items() if values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", action="append", required=True, metavar="NAME[=VALUE]")
    parser.add_argument("--model", type=Path, default=Path("/tmp/llama8b"))  # noqa: S108 -- a default for a bare machine
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rate", action="append", type=float)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--input-len", type=int, default=7500)
    parser.add_argument("--output-len", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=10.0, help="of load at each rate and round")
    parser.add_argument("--min-prompts", type=int, default=12)
    parser.add_argument("--buffer-gb", type=float, default=1.5)
    parser.add_argument("--kv-gb", type=float, default=2.5)
    parser.add_argument("--ready-seconds", type=float, default=400.0)
    parser.add_argument("--port-shift", type=int, default=0, metavar="N", help="added to every port")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="no round begins later")
    args = parser.parse_args()
    # SIGTERM ends the servers, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    variants: list[Variant] = []
    try:
        for number, variant in enumerate(args.variant):
            plan = plan_of(args, number, variant)
            plan.out.mkdir(parents=True, exist_ok=True)
            variants.append(Variant(plan))
        with ThreadPoolExecutor(len(variants)) as threads:
            list(threads.map(Variant.start, variants))
        print(f"all up after {time.monotonic() - began:.0f} s", flush=True)
        for variant in variants:
            variant.warm()
        rates = variants[0].measured.plan.rates
        for turn in range(args.rounds):
            for number, rate in enumerate(rates):
                for variant in variants[turn % len(variants) :] + variants[: turn % len(variants)]:
                    if time.monotonic() - began <= args.budget:
                        variant.load(rate, 100 + number + 1000 * turn)
                    else:
                        print(f"no time for {variant.measured.plan.out.name} at {rate:g}/s", flush=True)
    finally:
        with contextlib.ExitStack() as ends:
            for variant in variants:
                ends.callback(variant.end)
    shown: dict[str, Any] = {}
    for variant in variants:
        name = variant.measured.plan.out.name
        shown[name] = {f"{rate:g}/s": medians(variant, rate) for rate in rates}
        print(f"\n{name}")
        print_table(variant.measured.plan.out, (SYSTEM,))
    print(json.dumps(shown, indent=1))
    plans = [dataclasses.asdict(variant.measured.plan) for variant in variants]
    (args.out / "in_turn.json").write_text(json.dumps({"medians": shown, "plans": plans}, default=str))


if __name__ == "__main__":
    main()
