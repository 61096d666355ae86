"""Serving on several GPUs: vLLM aggregated, vLLM with NixlConnector, and vLLM with kvbelt, under the same load.

    python -m benchmarks.gpu.serving run --model DIR --system kvbelt --system nixl --system aggregated
    python -m benchmarks.gpu.serving table

``run`` starts one system after another, warms it, loads it with vLLM's own ``vllm bench serve`` at each rate, and
writes one JSON file a system; ``table`` puts the files side by side. Every system gets the same model, seeds,
arguments and clients, CUDA graphs on and prefix caching off.

* aggregated: as many plain servers, requests in turn (kvbelt's proxy without prefill workers: it relays bytes).
* nixl: NixlConnector behind the proxy of ``nixl_proxy.py``.
* kvbelt: KVBeltConnector behind kvbelt's proxy.

``--shape 2p2d`` takes four GPUs; with ``--halves`` each prefill server and its decode server are first measured as a
1p1d of their own, both at the same time, so that one start of the servers yields two repetitions of the one shape and
the other shape as well. ``--side-by-side`` runs the named systems at the same time, on GPUs, cores and ports of their
own; each run says in its JSON and in the table how many loads ran beside it. ``--gpus 0,0`` puts both servers on one
GPU: that tells whether answers are right and, with ``--trace``, where the time between first and second token goes; it
tells nothing about speed under load.
"""

import argparse
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu._client import Client
from benchmarks.gpu._facts import mean_utilisation, own_metrics, utilisation, verify, versions
from benchmarks.gpu._servers import (
    Front,
    Plan,
    Processes,
    Relay,
    get,
    halves_of,
    lane_of,
    places,
    start_front,
    start_system,
    whole_of,
)
from benchmarks.gpu._table import line_of, print_table

SYSTEMS = ("aggregated", "nixl", "kvbelt")

#: Of a load's time, besides the seconds in which requests are sent: the client's own, and the last answers.
LOAD_OVERHEAD = 20.0


class Measurement:
    """One system: its processes, and the results so far."""

    def __init__(self, plan: Plan, system: str) -> None:
        self.plan, self.system = plan, system
        self.logs = plan.out / "logs" / system
        self.logs.mkdir(parents=True, exist_ok=True)
        self.processes = Processes(self.logs)
        self.began = time.monotonic()
        self.result: dict[str, Any] = {
            "system": system,
            "versions": {},
            "plan": _plain(plan),
            "runs": [],
            "left_out": [],
        }

    def fits(self, what: str, seconds: float) -> bool:
        """Whether there is time for it; if not, that is recorded."""
        fits = time.monotonic() - self.began + seconds <= self.plan.budget_seconds
        if not fits:
            self.result["left_out"].append(what)
            print(f"{self.system}: no time for {what}", flush=True)
        return fits

    def note(self, run: dict[str, Any]) -> None:
        """Keep a result, whatever comes after it."""
        self.result["runs"].append(run)
        self.save()
        print(line_of(self.system, run), flush=True)

    def save(self) -> None:
        """Write the results so far."""
        (self.plan.out / f"{self.system}.json").write_text(json.dumps(self.result))

    def load(self, front: Front, client: Client, rate: float, seed: int) -> dict[str, Any]:
        """One load of one shape."""
        plan = self.plan
        prompts = self.prompts(rate)
        tag = f"{front.name}-{rate:g}-{seed}"
        with utilisation(plan.device) as samples:
            saved = client.load(front.port, self.logs, tag, rate, prompts, seed)
        busy = {gpu: found for gpu, found in mean_utilisation(samples).items() if int(gpu) in front.gpus}
        run = {"shape": f"{len(front.prefill)}p{len(front.decode)}d", "rate": rate, "prompts": prompts, "seed": seed}
        run |= {"beside": plan.lane.of - 1, "cores": len(front.cores or plan.lane.cores), "gpus": busy, "bench": saved}
        if self.system == "kvbelt":
            # The newest first; the proxy tells a hundred.
            told = json.loads(get(f"http://127.0.0.1:{front.port}/kvbelt/requests"))
            requests = told["requests"][:prompts]
            run["requests"] = requests
            run["paths"] = Counter(request["decision"]["path"] for request in requests)
        return run

    def prompts(self, rate: float) -> int:
        """The number of prompts of a load."""
        return max(self.plan.min_prompts, round(self.plan.seconds * rate))

    def warm(self, front: Front, client: Client) -> None:
        """Warm every server, every connection, and the shapes of the load."""
        client.load(front.port, self.logs, f"{front.name}-warm", 4.0, 8, 1)


def run_system(plan: Plan, system: str) -> None:
    """Start the system, warm it, load it at each rate, and write the results."""
    measured = Measurement(plan, system)
    processes, result = measured.processes, measured.result
    halves = halves_of(plan) if plan.halves else []
    # Clients import vLLM while the servers start.
    clients = [Client(plan, measured.logs / f"{front.name}-client.log", front.cores) for front in halves]
    clients.append(Client(plan, measured.logs / "client.log", plan.lane.cores))
    try:
        result["versions"] = versions(plan.device)
        start_system(plan, processes, system)
        result["start_seconds"] = time.monotonic() - measured.began
        result["start_lines"] = {name: start_lines(measured.logs / f"{name}.log") for name, _ in processes.running}
        print(f"{system}: up after {result['start_seconds']:.0f} s", flush=True)
        measured.save()
        relay = None
        if halves:
            measure_halves(measured, halves, clients)
            processes.stop("half")
            relay = Relay([front.notify for front in halves], whole_of(plan).notify) if system == "kvbelt" else None
        measure_whole(measured, clients[-1])
        if relay is not None:
            relay.close()
        if plan.trace:
            result["traces"] = {path.stem: path.read_text().splitlines() for path in measured.logs.glob("*.trace")}
        if system == "kvbelt":
            result["worker_metrics"] = {place.port: own_metrics(place.url) for side in places(plan) for place in side}
    finally:
        result["seconds"] = time.monotonic() - measured.began
        measured.save()
        for client in clients:
            client.close()
        processes.stop()


def measure_halves(measured: Measurement, halves: list[Front], clients: list[Client]) -> None:
    """Measure all halves at the same time, at each rate."""
    plan = measured.plan
    for front in halves:
        start_front(measured.processes, measured.system, front)
    with ThreadPoolExecutor(len(halves)) as threads:
        for _ in threads.map(measured.warm, halves, clients):
            pass
        for repetition in range(plan.repetitions):
            for number, rate in enumerate(plan.half_rates):
                if not measured.fits(f"halves at {rate:g}/s", measured.prompts(rate) / rate + LOAD_OVERHEAD):
                    continue
                seeds = [200 + number + 10 * half + 1000 * repetition for half in range(len(halves))]
                rates = [rate] * len(halves)
                for half, run in enumerate(threads.map(measured.load, halves, clients, rates, seeds)):
                    measured.note(run | {"half": half, "beside": run["beside"] + len(halves) - 1})


def measure_whole(measured: Measurement, client: Client) -> None:
    """Measure all servers together, at each rate."""
    plan, front = measured.plan, whole_of(measured.plan)
    start_front(measured.processes, measured.system, front)
    measured.warm(front, client)
    if measured.system == "kvbelt":
        measured.result["verified"] = verify(front.prefill[0].url, front.decode[0].url, plan.input_len)
        print(f"verified: {measured.result['verified']}", flush=True)
    for repetition in range(plan.repetitions):
        for number, rate in enumerate(plan.rates):
            if measured.fits(f"{rate:g}/s", measured.prompts(rate) / rate + LOAD_OVERHEAD):
                measured.note(measured.load(front, client, rate, 100 + number + 1000 * repetition))


def start_lines(log: Path) -> list[str]:
    """The lines of a server's log about the duration of its start."""
    telling = re.compile(r"took|takes|finished in|seconds", re.IGNORECASE)
    return [line for line in log.read_text(errors="replace").splitlines() if telling.search(line)][:40]


def _plain(plan: Plan) -> dict[str, Any]:
    plain = dataclasses.asdict(plan)
    return plain | {"model": plan.model.name, "out": plan.out.name}


def side_by_side(systems: list[str], arguments: list[str]) -> None:
    """Run each system in its process and lane, all at the same time."""
    shared = [argument for argument in arguments if argument != "--side-by-side"]
    at_once = []
    for number, system in enumerate(systems):
        command = [sys.executable, "-m", "benchmarks.gpu.serving", *shared, "--lane", f"{number}/{len(systems)}"]
        at_once.append(subprocess.Popen([*command, "--only", system]))
    try:
        failed = [system for system, process in zip(systems, at_once, strict=True) if process.wait() != 0]
    finally:
        for process in at_once:
            process.terminate()
        for process in at_once:
            process.wait()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def read_plan(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Plan:
    """The plan on the command line."""
    defaults = ["--load-format", "dummy", "--max-model-len", "9000", "--gpu-memory-utilization", "0.8"]
    if args.device == "cpu":
        defaults = ["--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"]
    shape = re.fullmatch(r"(\d+)p(\d+)d", args.shape)
    if shape is None:
        parser.error(f"--shape is {args.shape!r}; give it as 1p1d or 2p2d")
    if args.halves and shape[1] != shape[2]:
        parser.error(f"--halves needs as many prefill as decode servers, not {args.shape}")
    lane = re.fullmatch(r"(\d+)/(\d+)", args.lane)
    if lane is None or int(lane[1]) >= int(lane[2]):
        parser.error(f"--lane is {args.lane!r}; of two there are 0/2 and 1/2")
    return Plan(
        model=args.model,
        out=args.out,
        device=args.device,
        rates=args.rate or [1.0, 4.0],
        input_len=args.input_len,
        output_len=args.output_len,
        seconds=args.seconds,
        min_prompts=args.min_prompts,
        server_arguments=defaults + args.server,
        buffer_bytes=int(args.buffer_gb * (1 << 30)),
        ready_seconds=args.ready_seconds,
        num_prefill=int(shape[1]),
        num_decode=int(shape[2]),
        gpus=[int(gpu) for gpu in args.gpus.split(",")] if args.gpus else [],
        repetitions=args.repetitions,
        extra=dict(pair.partition("=")[::2] for pair in args.kv),
        trace=args.trace,
        lane=lane_of(int(lane[1]), int(lane[2]), args.port_shift),
        halves=args.halves,
        half_rates=args.half_rate or [1.0, 4.0],
        budget_seconds=args.budget,
    )


def main() -> None:
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
    parser.add_argument("--halves", action="store_true", help="measure each prefill server with a decode server first")
    parser.add_argument("--half-rate", action="append", type=float)
    parser.add_argument("--gpus", default="", help="one a server, prefill first: 0,1; 0,0 puts both on one")
    parser.add_argument(
        "--side-by-side", action="store_true", help="all systems at once, each on its own GPUs and cores"
    )
    parser.add_argument(
        "--lane", default="0/1", metavar="I/N", help="use the I-th of N shares of GPUs, cores and ports"
    )
    parser.add_argument("--port-shift", type=int, default=0, metavar="N", help="added to every port")
    parser.add_argument("--only", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="a system's, in all")
    parser.add_argument(
        "--kv", action="append", default=[], metavar="KEY=VALUE", help="a setting of kvbelt's connector"
    )
    parser.add_argument("--trace", action="store_true", help="note when each hook of the connector is called")
    parser.add_argument("--server", action="append", default=[], metavar="ARGUMENT", help="one more for every server")
    args = parser.parse_args()
    if args.what == "table":
        print_table(args.out, SYSTEMS)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    # SIGTERM ends the servers, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    systems = [args.only] if args.only else args.system or list(SYSTEMS)
    if args.side_by_side and not args.only:
        if args.gpus:
            parser.error("--side-by-side deals GPUs out itself; leave --gpus out")
        side_by_side(systems, sys.argv[1:])
    else:
        plan = read_plan(parser, args)
        os.sched_setaffinity(0, plan.lane.cores)
        for system in systems:
            run_system(plan, system)
    if not args.only:
        print_table(args.out, SYSTEMS)


if __name__ == "__main__":
    main()
