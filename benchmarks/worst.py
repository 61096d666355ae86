"""How long one client's small requests wait for their first token while another client does its worst.

The one sends short prompts, one after another. The other one sends everything of ``_worst.py``, four at once. Target:
the 99th percentile of TTFT is at most three times the quiet one, or 50 ms.

    python -m benchmarks.worst [--model DIR] [--requests 300] [--json FILE]
"""

import subprocess
import sys
import time

import httpx
from benchmarks._run import (
    Summary,
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
from kvbelt.ops.processes import DeploymentSpec
from kvbelt.ops.topology import Topology

TARGET_RATIO = 3.0
#: A step of the proxy that takes longer is a fault by itself; below it, a ratio says little.
FLOOR_MS = 50.0


def first_tokens(url: str, requests: int) -> list[float]:
    """TTFT of each request, in milliseconds."""
    times: list[float] = []
    with httpx.Client(base_url=url, timeout=120) as client:
        for number in range(requests):
            body = {"prompt": f"The capital of country {number} is", "max_tokens": 4, "temperature": 0, "stream": True}
            began = time.perf_counter()
            with client.stream("POST", "/v1/completions", json=body) as answer:
                answer.raise_for_status()
                for _ in answer.iter_raw():
                    if len(times) == number:
                        times.append(1e3 * (time.perf_counter() - began))
    return times


def beside_the_worst(url: str, requests: int) -> list[float]:
    command = [sys.executable, "-m", "benchmarks._worst", url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdout.readline()
        times = first_tokens(url, requests)
        other.stdin.close()
        other.wait()
    return times


def main() -> int:
    """Measure and print. Status 1 if the target was missed."""
    arguments = parser(__doc__)
    add_model_arguments(arguments)
    arguments.add_argument("--topology", default="1p1d")
    arguments.add_argument("--requests", type=int, default=300)
    args = arguments.parse_args()
    spec = DeploymentSpec(
        topology=Topology.parse(args.topology),
        model=model_folder(args.model),
        dtype=args.dtype,
        auto_ports=True,
        threads=1,
    )
    found: dict[str, Summary] = {}
    with running(spec, quiet_terminal()) as deployment:
        first_tokens(deployment.url, 50)
        for name, measure in (("quiet", first_tokens), ("beside the worst", beside_the_worst)):
            note(f"{name}: {args.requests} requests")
            found[name] = summarise(measure(deployment.url, args.requests))
    quiet, beside = found["quiet"], found["beside the worst"]
    most = max(TARGET_RATIO * quiet.p99, FLOOR_MS)
    reached = beside.p99 <= most
    rows = [[name, f"{one.median:.1f}", f"{one.high:.1f}", f"{one.p99:.1f}"] for name, one in found.items()]
    shown = table(["TTFT, ms", "median", "90 %", "99 %"], rows)
    shown += "\n\n" + verdict(reached, f"99 % within {beside.p99:.0f} ms, target {most:.0f} ms")
    results = {"ttft_ms": found, "ratio_of_p99": beside.p99 / quiet.p99}
    finish(f"worst {args.topology}, {args.requests} requests", shown, results, args.json)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
