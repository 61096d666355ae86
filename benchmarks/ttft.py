"""Time to first token and to the last: a prefill and a decode worker against one aggregated server.

Both run at the same time, with the same number of threads a worker. One streaming client asks them in turn, so that
other load on the machine affects them alike. Each gets each prompt once. Target: 1p1d's median TTFT is at most 1.10
times the aggregated server's, for each prompt length.

    python -m benchmarks.ttft [--lengths 100,500,1500] [--rounds 15] [--threads N] [--json FILE]
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import httpx
from benchmarks._run import (
    Prompts,
    add_model_arguments,
    figure,
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
from kvbelt.ops.processes import SPLIT_ALL, DeploymentSpec, cpu_cores
from kvbelt.ops.topology import Topology

TARGET_RATIO = 1.10
_WARM_UP_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Timed:
    """One streamed request, in milliseconds."""

    ttft: float
    itl: float  #: mean gap between the later tokens
    path: str


class Asker:
    """One client of one server, over one connection."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=300)
        self._model = self._client.get("/v1/models").json()["data"][0]["id"]

    def ask(self, prompt: list[int], tokens: int) -> Timed:
        """Stream one completion.

        Raises:
            RuntimeError: the answer holds no tokens or an error.
        """
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        arrivals: list[float] = []
        started = time.perf_counter()
        with self._client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"status {answer.status_code}: {answer.read()!r}")
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    now = time.perf_counter()
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RuntimeError(line)
                    # A token whose text is held back sends no event; the first event is what a user sees first.
                    if event["choices"]:
                        arrivals.append(now)
            path = answer.headers.get("x-kvbelt-path", "")
        if not arrivals:
            raise RuntimeError("an answer without a token")
        gaps = max(1, tokens - 1)
        return Timed(1e3 * (arrivals[0] - started), 1e3 * (arrivals[-1] - arrivals[0]) / gaps, path)


def main() -> int:
    """Measure and print. Status 1 if the target was missed."""
    arguments = parser(__doc__)
    add_model_arguments(arguments)
    arguments.add_argument("--lengths", default="100,500,1500", help="prompt lengths in tokens")
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--tokens", type=int, default=8, help="tokens of each answer")
    arguments.add_argument("--threads", type=int, default=max(1, cpu_cores() // 2), help="of each worker")
    arguments.add_argument("--seed", type=int, default=0)
    args = arguments.parse_args()
    lengths = [int(length) for length in args.lengths.split(",")]
    spec = DeploymentSpec(
        topology=Topology(1, 1),
        model=model_folder(args.model),
        dtype=args.dtype,
        auto_ports=True,
        threads=args.threads,
        proxy_args=SPLIT_ALL,
    )
    prompts = Prompts(spec.model, args.seed)
    with (
        running(spec, quiet_terminal()) as apart,
        running(replace(spec, topology=Topology(0, 1)), quiet_terminal()) as together,
    ):
        askers = {"1p1d": Asker(apart.url), "0p1d": Asker(together.url)}
        timed: dict[tuple[str, int], list[Timed]] = {(name, length): [] for name in askers for length in lengths}
        for round_ in range(-_WARM_UP_ROUNDS, args.rounds):
            note(f"round {round_ + 1} of {args.rounds}" if round_ >= 0 else "warming up")
            for length in lengths:
                prompt = prompts.make(length)
                order = list(askers) if round_ % 2 else list(reversed(askers))
                for name in order:
                    answer = askers[name].ask(prompt, args.tokens)
                    if round_ >= 0:
                        timed[name, length].append(answer)
    results: list[dict[str, Any]] = []
    rows = []
    for length in lengths:
        ours = summarise(answer.ttft for answer in timed["1p1d", length])
        theirs = summarise(answer.ttft for answer in timed["0p1d", length])
        pairs = zip(timed["1p1d", length], timed["0p1d", length], strict=True)
        ratio = ours.median / theirs.median
        paired = summarise(one.ttft / other.ttft for one, other in pairs)
        itl = {name: summarise(answer.itl for answer in timed[name, length]) for name in askers}
        paths = sorted({answer.path for answer in timed["1p1d", length]})
        results.append(
            {
                "prompt_tokens": length,
                "ttft_ms": {"1p1d": ours, "0p1d": theirs},
                "ratio_of_medians": ratio,
                "paired_ratio": paired,
                "itl_ms": itl,
                "paths": paths,
            }
        )
        rows.append(
            [str(length), str(ours), str(theirs), f"{ratio:.3f}", str(paired)]
            + [figure(itl[name].median) for name in askers]
            + [", ".join(paths)]
        )
    head = ["prompt", "TTFT 1p1d, ms", "TTFT 0p1d, ms", "ratio", "paired ratio", "ITL 1p1d", "ITL 0p1d", "paths"]
    worst = max(result["ratio_of_medians"] for result in results)
    reached = worst <= TARGET_RATIO
    shown = table(head, rows) + "\n\nmedian (10th to 90th percentile)\n"
    shown += verdict(reached, f"TTFT at most {worst:.3f} of aggregated, target {TARGET_RATIO:.2f}")
    title = f"ttft, one client, {args.rounds} rounds, {args.threads} threads a worker, {args.dtype}"
    finish(title, shown, results, args.json)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
