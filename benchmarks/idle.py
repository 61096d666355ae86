"""CPU and memory of an idle deployment, over all its processes.

An idle system must sleep: a polling thread shows as a share of a core. The measurement follows one request, so that
every connection and every lazily started thread exists. Target: under 5 % of one core in total.

    python -m benchmarks.idle [--topology 1p1d] [--windows 3] [--seconds 20] [--json FILE]
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from benchmarks._run import (
    add_model_arguments,
    finish,
    model_folder,
    note,
    parser,
    quiet_terminal,
    summarise,
    table,
    verdict,
)

from kvbelt.ops.deployment import running
from kvbelt.ops.processes import SPLIT_ALL, DeploymentSpec
from kvbelt.ops.topology import Topology

TARGET_PERCENT = 5.0
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process with all its threads, in the kernel's ticks (usually 10 ms)."""
    after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / _TICKS


def memory_mb(pid: int, key: str) -> float:
    """Memory in MB: ``Rss`` resident, ``Pss`` with shared pages divided among their users."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def switches(pid: int) -> int:
    """How often its threads woke up: voluntary context switches."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("voluntary_ctxt_switches:"):
                total += int(line.split()[1])
    return total


def ask(url: str) -> None:
    """Send one request, so that everything that starts on first use has started."""
    body = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    with httpx.Client(base_url=url, timeout=120) as client:
        body["model"] = client.get("/v1/models").json()["data"][0]["id"]
        client.post("/v1/completions", json=body).raise_for_status()


def main() -> int:
    """Measure and print. Status 1 if the target was missed."""
    arguments = parser(__doc__)
    add_model_arguments(arguments)
    arguments.add_argument("--topology", default="1p1d")
    arguments.add_argument("--windows", type=int, default=3)
    arguments.add_argument("--seconds", type=float, default=20.0)
    args = arguments.parse_args()
    spec = DeploymentSpec(
        topology=Topology.parse(args.topology),
        model=model_folder(args.model),
        dtype=args.dtype,
        auto_ports=True,
        proxy_args=SPLIT_ALL,
    )
    with running(spec, quiet_terminal()) as deployment:
        ask(deployment.url)
        pids = {process.name: process.pid for process in deployment.processes} | {"launcher": os.getpid()}
        percents: dict[str, list[float]] = {name: [] for name in [*pids, "all"]}
        wakeups: dict[str, list[float]] = {name: [] for name in [*pids, "all"]}
        time.sleep(1.0)  # what the request left to do is over
        for window in range(args.windows):
            note(f"window {window + 1} of {args.windows}: {args.seconds:g} s")
            before = {name: (cpu_seconds(pid), switches(pid)) for name, pid in pids.items()}
            started = time.monotonic()
            time.sleep(args.seconds)
            elapsed = time.monotonic() - started
            for name, pid in pids.items():
                percents[name].append(100 * (cpu_seconds(pid) - before[name][0]) / elapsed)
                wakeups[name].append((switches(pid) - before[name][1]) / elapsed)
            percents["all"].append(sum(percents[name][-1] for name in pids))
            wakeups["all"].append(sum(wakeups[name][-1] for name in pids))
        memory = {name: (memory_mb(pid, "Rss"), memory_mb(pid, "Pss")) for name, pid in pids.items()}
        memory["all"] = (sum(rss for rss, _ in memory.values()), sum(pss for _, pss in memory.values()))
    total = summarise(percents["all"])
    reached = total.median < TARGET_PERCENT
    results: dict[str, Any] = {
        name: {
            "cpu_percent_of_a_core": summarise(percents[name]),
            "wakeups_per_second": summarise(wakeups[name]),
            "rss_mb": memory[name][0],
            "pss_mb": memory[name][1],
        }
        for name in percents
    }
    rows = [
        [
            name,
            f"{summarise(percents[name]).median:.2f}",
            f"{min(percents[name]):.2f} to {max(percents[name]):.2f}",
            f"{summarise(wakeups[name]).median:.0f}",
            f"{memory[name][0]:,.0f}",
            f"{memory[name][1]:,.0f}",
        ]
        for name in percents
    ]
    shown = table(["process", "CPU, % of a core", "range", "wake-ups/s", "resident MB", "its share MB"], rows)
    shown += "\n\n" + verdict(reached, f"{total.median:.2f} % of a core in all, target under {TARGET_PERCENT:g} %")
    finish(f"idle {args.topology}, {args.windows} windows of {args.seconds:g} s", shown, results, args.json)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
