"""Placement under load: plain vLLM servers and kvbelt, all started once and then loaded one after the other.

    python -m benchmarks.gpu.placement start --model DIR            # on each of two GPUs a server of each kind
    python -m benchmarks.gpu.placement start --model DIR --servers 1 --gpus 1       # one of each on one GPU: 0p1d
    python -m benchmarks.gpu.placement rows --system plain --system plain-least@1024 \
        --system 'elastic=--placement elastic --slo-itl-ms 50' --load even:6 --load poisson:4x120
    python -m benchmarks.gpu.placement table FILE...
    python -m benchmarks.gpu.placement compact FILE... --out RESULTS.json
    python -m benchmarks.gpu.placement stop

Servers outlive ``start``, and idle ones use no GPU. A load is sent to one system at a time: every system gets the same
arrivals and prompts, after some requests to warm up.

* ``plain[-least][@TOKENS]``: the plain servers. The client itself chooses: in turn, or the server with the fewest
  requests outstanding. No proxy is in the way, which favours these systems. TOKENS is what a step may have.
* ``NAME=ARGUMENTS``: the servers with KVBeltConnector behind ``kvbelt proxy`` with these arguments as well. The last
  one is the decode server.
* ``direct``: the same servers without the proxy. They answer whole requests, with an idle connector.
* ``nixl``: 1p1d with NixlConnector behind the proxy of ``nixl_proxy.py`` (``start --kind nixl``).
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import shlex
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu._facts import mean_utilisation, own_metrics, utilisation, verify, versions
from benchmarks.gpu._figures import cells, figures_of, print_results, results_of, write_results
from benchmarks.gpu._load import Load, Router, parse_load, questions, send
from benchmarks.gpu._rows import Row, add_records, read_rows, write_row
from benchmarks.gpu._servers import (
    FRONT,
    NAME,
    NOTIFY,
    Front,
    Place,
    Plan,
    Processes,
    get,
    server,
    start_front,
    wait_for,
)

#: The first port of each kind of server.
PORTS = {"plain": 7110, "kvbelt": 7210, "nixl": 7130}
#: Of a load's time, besides the seconds in which requests are sent: the proxy's start, warming up, the last answers.
OVERHEAD_SECONDS = 15.0

#: Where there are many cores, the client and the proxy have two each that no server has.
CORES = tuple(sorted(os.sched_getaffinity(0)))
CLIENT_CORES, PROXY_CORES, SERVER_CORES = (
    (CORES[-2:], CORES[-4:-2], CORES[:-4]) if len(CORES) >= 12 else (CORES, CORES, CORES)
)

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class System:
    """What is loaded."""

    name: str
    kind: str
    least: bool = False
    tokens: int = 0  #: at most, of a step of plain servers; 0: as they were started
    arguments: tuple[str, ...] = ()
    proxied: bool = True  #: False: the client chooses the server


def parse_system(text: str) -> System:
    """Read ``plain-least@1024``, ``nixl``, ``elastic=--placement elastic``.

    Raises:
        ValueError: it is none of these.
    """
    name, told, arguments = text.partition("=")
    if told and re.fullmatch(r"[\w.-]+", name):
        return System(name, "kvbelt", arguments=tuple(shlex.split(arguments)))
    if text in ("nixl", "direct"):
        return System(text, "nixl" if text == "nixl" else "kvbelt", proxied=text == "nixl")
    plain = re.fullmatch(r"plain(-least)?(?:@(\d+))?", text)
    if plain is None:
        raise ValueError(
            f"{text!r} is no system; examples: plain, plain-least@1024, direct, nixl, 'NAME=--placement elastic'"
        )
    return System(text, "plain", plain[1] is not None, int(plain[2] or 0), proxied=False)


class Machine:
    """The folder that all commands share: the servers' addresses, process numbers, logs and step limits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self._file = folder / "servers.json"

    def keep(self, servers: dict[str, int]) -> None:
        """Remember process numbers."""
        self._file.write_text(json.dumps(self.servers() | servers))

    def servers(self) -> dict[str, int]:
        """Process numbers by name."""
        return dict(json.loads(self._file.read_text())) if self._file.exists() else {}

    def forget(self) -> None:
        self._file.unlink(missing_ok=True)

    def step_limit(self, number: int) -> Path:
        return self.folder / f"plain{number}.limit"


def places_of(kind: str, args: argparse.Namespace) -> list[Place]:
    """The servers of a kind, dealt out to the GPUs (or cores)."""
    units = len(CORES) if args.device == "cpu" else args.gpus
    return [Place(number, number % units, PORTS[kind] + number, 0) for number in range(args.servers)]


def plan_of(args: argparse.Namespace, machine: Machine) -> Plan:
    """What all servers have in common."""
    servers = ["--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"]
    if args.device == "cuda":
        # Told how much KV to keep, servers that start together on one GPU need not measure what others leave.
        servers = ["--load-format", "dummy", "--max-model-len", "14336", "--max-num-seqs", "64"]
        servers += ["--max-num-batched-tokens", "8192", "--gpu-memory-utilization", "0.42"]
        servers += [f"--kv-cache-memory-bytes={int(args.kv_gb * GIB)}"]
    return Plan(
        model=args.model, out=machine.folder, device=args.device, rates=[], input_len=args.input_len, output_len=16,
        seconds=0, min_prompts=0, server_arguments=servers + args.server, buffer_bytes=int(args.buffer_gb * GIB),
        ready_seconds=args.ready_seconds, extra=dict(pair.partition("=")[::2] for pair in args.kv),
    )  # fmt: skip


def start(args: argparse.Namespace) -> None:
    """Start all servers at once, wait until they serve, and check kvbelt's answers in both directions."""
    machine, began = Machine(args.folder), time.monotonic()
    os.sched_setaffinity(0, SERVER_CORES)
    plan, processes = plan_of(args, machine), Processes(machine.logs)
    places = {kind: places_of(kind, args) for kind in args.kind or ["plain", "kvbelt"]}
    for kind, pair in places.items():
        for place in pair:
            start_server(plan, machine, processes, kind, place)
    machine.keep({name: process.pid for name, process in processes.running})
    for pair in places.values():
        for place in pair:
            wait_for(place.url + "/health", processes, plan.ready_seconds)
    print(f"{len(processes.running)} servers serve after {time.monotonic() - began:.0f} s", flush=True)
    if "kvbelt" in places:
        for prefill, decode in itertools.permutations(places["kvbelt"], 2):
            found = verify(prefill.url, decode.url, plan.input_len)
            print(f"{prefill.port} to {decode.port}: {json.dumps(found)}", flush=True)


def start_server(plan: Plan, machine: Machine, processes: Processes, kind: str, place: Place) -> None:
    """Start one server of a kind."""
    own = plan
    kv: dict[str, Any] | None = None
    if kind == "plain":
        scheduler = ["--scheduler-cls", "benchmarks.gpu.step_limit.StepLimitScheduler", "--async-scheduling"]
        limit = {"KVBELT_STEP_LIMIT": str(machine.step_limit(place.number).resolve())}
        own = dataclasses.replace(plan, environment=limit, server_arguments=plan.server_arguments + scheduler)
    elif kind == "kvbelt":
        extra = {"pd_buffer_size": plan.buffer_bytes, "pd_proxy_host": "127.0.0.1", "pd_proxy_port": NOTIFY}
        kv = {"kv_connector": "KVBeltConnector", "kv_connector_module_path": "kvbelt.vllm", "kv_role": "kv_both"}
        kv["kv_connector_extra_config"] = extra | plan.extra
    else:
        kv = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": plan.device}
    server(own, processes, f"{kind}{place.number}", place, kv)


@contextlib.contextmanager
def serving(system: System, machine: Machine, places: list[Place]) -> Iterator[tuple[list[int], Router]]:
    """During the block: the ports that the client sends to, and the router that chooses among them."""
    if not system.proxied:
        for place in places if system.kind == "plain" else ():
            limit = machine.step_limit(place.number)
            limit.with_suffix(".taken").unlink(missing_ok=True)
            limit.write_text(str(system.tokens or ""))
        yield [place.port for place in places], Router(len(places), least=system.least)
        return
    processes = Processes(machine.logs)
    front = Front(f"proxy-{system.name}", FRONT, NOTIFY, places[:-1], places[-1:], PROXY_CORES)
    try:
        start_front(processes, system.kind, front, system.arguments)
        yield [FRONT], Router(1)
    finally:
        processes.stop()


def measure(args: argparse.Namespace, machine: Machine, system: System, load: Load, seed: int) -> Row:
    """Warm one system, send one load, and return what was seen."""
    warming = dataclasses.replace(load, arrivals="even", rate=4.0, seconds=args.warm / 4)
    asked, first = questions(load, seed, NAME), questions(warming, 0, NAME)
    places = places_of(system.kind, args)
    with serving(system, machine, places) as (ports, router):
        warm, _ = send(first, ports, router)
        if failed := [answer.error for answer in warm if answer.error]:
            raise SystemExit(f"{system.name}: {len(failed)} of {len(warm)} requests to warm up failed: {failed[0]}")
        if system.kind == "plain":
            require_limit(system, machine, places)
        with utilisation(args.device) as samples:
            answers, seconds = send(asked, ports, router)
        about: dict[str, Any] = {"arguments": system.arguments, "versions": versions(args.device)}
        about["preemptions"] = [preemptions(place.url) for place in places]
        if system.kind == "kvbelt" and system.proxied:
            front = f"http://127.0.0.1:{FRONT}"
            about["metrics"] = own_metrics(front)
            add_records(answers, json.loads(get(front + "/kvbelt/requests?limit=1000"))["requests"])
    return Row(system.name, load.name, seed, load.rate, seconds, answers, mean_utilisation(samples), about)


def preemptions(url: str) -> list[str]:
    """A server's line about requests that lost their KV for want of memory, since it started."""
    lines = get(url + "/metrics").decode().splitlines()
    return [line for line in lines if line.startswith("vllm:num_preemptions_total")]


def require_limit(system: System, machine: Machine, places: list[Place]) -> None:
    """End the run unless all plain servers have taken the limit of a step."""
    for place in places:
        taken = machine.step_limit(place.number).with_suffix(".taken")
        told = taken.read_text() if taken.exists() else "not read"
        if told != str(system.tokens or told) or told == "not read":
            raise SystemExit(
                f"{system.name}: server {place.number} has taken the step limit {told!r}, not {system.tokens}"
            )


def rows(args: argparse.Namespace) -> None:
    """Send every load to every system; what does not fit into the budget is left out."""
    machine, began, failed = Machine(args.folder), time.monotonic(), []
    os.sched_setaffinity(0, CLIENT_CORES)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for load in args.load:
        for seed in load.seeds:
            for system in args.system:
                what = f"{system.name} {load.name} seed {seed}"
                if time.monotonic() - began + load.seconds + OVERHEAD_SECONDS > args.budget:
                    print(f"no time for {what}", flush=True)
                    continue
                try:
                    row = measure(args, machine, system, load, seed)
                except (SystemExit, OSError) as error:  # the others are still worth their time
                    print(f"{what} failed: {error}", flush=True)
                    failed.append(what)
                    continue
                write_row(args.out, row)
                print("| " + " | ".join(cells(figures_of([row]))) + f" | {time.monotonic() - began:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def table(args: argparse.Namespace) -> None:
    """Print the rows of some files, in milliseconds."""
    print_results(results_of(read_rows(args.files)))


def compact(args: argparse.Namespace) -> None:
    """Write the figures of some files' rows, without the times of each request: what is published."""
    write_results(args.out, results_of(read_rows(args.files)))


def stop(args: argparse.Namespace) -> None:
    """End all servers: first with SIGTERM, then with SIGKILL."""
    machine = Machine(args.folder)
    alive = set(machine.servers().values())
    for number, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
        give_up = time.monotonic() + seconds
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, number)
        while alive and time.monotonic() < give_up:
            alive = {process for process in alive if Path(f"/proc/{process}").exists()}
            time.sleep(0.2)
    machine.forget()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command: dict[str, argparse.ArgumentParser] = {}
    for run in (start, rows, stop, table, compact):
        command[run.__name__] = commands.add_parser(run.__name__, help=(run.__doc__ or "").partition("\n")[0])
        command[run.__name__].set_defaults(run=run)
    folder = Path("/tmp/kvbelt-placement")  # noqa: S108 -- a default for a bare machine
    for name in ("start", "rows", "stop"):
        add = command[name].add_argument
        add("--folder", type=Path, default=folder, help="shared by all commands (default: %(default)s)")
        add("--device", choices=("cuda", "cpu"), default="cuda")
        add("--servers", type=int, default=2, metavar="N", help="of each kind (default: %(default)d)")
        add("--gpus", type=int, default=2, metavar="N", help="that the servers share (default: %(default)d)")
    add = command["start"].add_argument
    add("--model", type=Path, default=Path("/tmp/llama8b"))  # noqa: S108 -- likewise
    add("--kind", action="append", choices=tuple(PORTS), help="of servers (default: plain and kvbelt)")
    add("--server", action="append", default=[], metavar="ARGUMENT", help="one more for every server")
    add("--kv", action="append", default=[], metavar="KEY=VALUE", help="a setting of kvbelt's connector")
    add("--kv-gb", type=float, default=42.0, help="KV memory of a server (default: %(default)g)")
    add("--buffer-gb", type=float, default=4.0, help="of a kvbelt server, each way (default: %(default)g)")
    add("--input-len", type=int, default=7500, help="of the longest prompt whose answer is checked")
    add("--ready-seconds", type=float, default=420.0)
    add = command["rows"].add_argument
    add("--system", action="append", required=True, type=parse_system, metavar="SYSTEM")
    add("--load", action="append", required=True, type=parse_load, metavar="LOAD", help="even:6, poisson:4x120, ...")
    add("--budget", type=float, default=float("inf"), metavar="SECONDS", help="what does not fit is left out")
    add("--warm", type=int, default=12, metavar="REQUESTS", help="before each load, at 4/s (default: %(default)s)")
    add("--out", type=Path, default=Path("gpu-results/rows.jsonl"), help="gets a line for each load")
    for name in ("table", "compact"):
        command[name].add_argument("files", nargs="+", type=Path)
    command["compact"].add_argument("--out", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args()
    # SIGTERM ends the proxy, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args.run(args)


if __name__ == "__main__":
    main()
