"""Where growing and shared prefixes go: placement by load and by what workers hold, against round robin, on 2p2d.

* *turns*: conversations whose every prompt is the one before and more. Target: the median TTFT of later turns is at
  most half of round robin's.
* *one prefix*: half of all prompts have one long beginning. Target: no worker is busy for more than 1.5 times the mean.

Both variants run at the same time and are loaded in turn with the same requests.

    python -m benchmarks.conversations [--turns 5] [--share 50] [--seconds 30] [--seeds 5] [--json FILE]
"""

import argparse
import random
import statistics
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import httpx
from benchmarks._run import figure, finish, note, parser, summarise, table, verdict
from benchmarks._variants import ELASTIC, Deployments, Variant, add_arguments, answers_of, model
from benchmarks.gpu._load import Question, completion_body
from benchmarks.gpu._rows import Answer

from kvbelt.ops.deployment import SyncDeployment

VARIANTS = (Variant("round robin", "2p2d", ("--placement", "split")), Variant("elastic", "2p2d", ELASTIC))
TARGET_RATIO = 0.5
TARGET_BUSIEST = 1.5

_BUSY = "kvbelt_engine_busy_seconds_total "


class Writer:
    """Makes prompts of random token ids, and requests of them."""

    def __init__(self, seed: int, answer: int) -> None:
        self.chance = random.Random(seed)
        self._answer = answer

    def ids(self, number: int) -> list[str]:
        """Token ids, as they are written in JSON."""
        return [str(self.chance.randrange(3, 40_000)) for _ in range(number)]

    def question(self, at: float, ids: list[str]) -> Question:
        """A request at a moment."""
        return Question(at, len(ids), completion_body(model().name, ",".join(ids), self._answer))


def moments(chance: random.Random, rate: float, seconds: float) -> Iterable[float]:
    """Poisson arrivals."""
    at = chance.expovariate(rate)
    while at < seconds:
        yield at
        at += chance.expovariate(rate)


def talks(args: argparse.Namespace, rate: float, seed: int) -> list[tuple[int, Question]]:
    """Requests of conversations, by time, each with the number of its turn. The last turn's prompt is the longest."""
    writer = Writer(seed, args.answer)
    each = args.prompt // args.turns
    asked = []
    for began in moments(writer.chance, rate / args.turns, args.seconds):
        ids: list[str] = []
        for turn in range(args.turns):
            ids = ids + writer.ids(each)
            asked.append((turn, writer.question(began + turn * args.gap, ids)))
    return sorted(asked, key=lambda one: one[1].at)


def shared(args: argparse.Namespace, rate: float, seed: int) -> list[Question]:
    """Requests of which half begin alike."""
    writer = Writer(seed, args.answer)
    own = args.prompt // 10
    head = writer.ids(args.prompt - own)
    return [
        writer.question(at, head + writer.ids(own) if writer.chance.random() < 0.5 else writer.ids(args.prompt))
        for at in moments(writer.chance, rate, args.seconds)
    ]


def busy(deployment: SyncDeployment) -> dict[str, float]:
    """Seconds that each worker's engine has computed."""
    seconds = {}
    for worker in deployment.workers:
        lines = httpx.get(f"{worker.url}/metrics", timeout=30).text.splitlines()
        seconds[worker.name] = next(float(line.removeprefix(_BUSY)) for line in lines if line.startswith(_BUSY))
    return seconds


def require(answers: Iterable[Answer]) -> list[Answer]:
    """Raises RuntimeError: a request failed."""
    answers = list(answers)
    if errors := [answer.error for answer in answers if answer.error]:
        raise RuntimeError(f"{len(errors)} of {len(answers)} requests failed: {errors[0]}")
    return answers


def run(args: argparse.Namespace, deployment: SyncDeployment, rate: float, seed: int) -> dict[str, Any]:
    """Both loads of one variant with one seed."""
    asked = talks(args, rate, seed)
    answers = require(answers_of(deployment, [question for _, question in asked]))
    ttft = [answer.ttft for (turn, _), answer in zip(asked, answers, strict=True) if turn]
    before = busy(deployment)
    require(answers_of(deployment, shared(args, rate, seed)))
    worked = {name: seconds - before[name] for name, seconds in busy(deployment).items()}
    return {
        "seed": seed,
        "requests": len(answers),
        "ttft_p50_ms": statistics.median(ttft),
        "busy_seconds": worked,
        "busiest_over_mean": max(worked.values()) / statistics.fmean(worked.values()),
    }


def main() -> int:
    """Measure and print. Status 1 if a target was missed."""
    arguments = parser(__doc__)
    add_arguments(arguments, VARIANTS, prompt=1500)
    arguments.add_argument("--turns", type=int, default=5, help="of a conversation")
    arguments.add_argument("--gap", type=float, default=3.0, help="seconds between two turns")
    arguments.add_argument("--share", type=int, default=50, help="of the first variant's capacity, in percent")
    args = arguments.parse_args()
    variants = args.variant or VARIANTS
    runs: dict[str, list[dict[str, Any]]] = {one.name: [] for one in variants}
    with ExitStack() as stack:
        deployments = Deployments(stack, variants, args)
        rate = deployments.measured.capacity * args.share / 100
        for seed in range(1, args.seeds + 1):
            note(f"seed {seed} of {args.seeds}: {rate:.2f} requests/s")
            for variant, deployment in deployments.in_turn(seed):
                runs[variant.name].append(run(args, deployment, rate, seed))
    rows, reached, says = [], True, ""
    for name, ours in runs.items():
        ratio = summarise(
            one["ttft_p50_ms"] / other["ttft_p50_ms"] for one, other in zip(ours, runs[variants[0].name], strict=True)
        )
        busiest = summarise(one["busiest_over_mean"] for one in ours)
        ttft = summarise(one["ttft_p50_ms"] for one in ours)
        rows.append([name, str(ttft), str(ratio), str(busiest)])
        if name != variants[0].name:
            says += verdict(ratio.median <= TARGET_RATIO, f"{name}: TTFT {figure(ratio.median)} of the first") + "\n"
            says += (
                verdict(busiest.median <= TARGET_BUSIEST, f"{name}: busiest over mean {figure(busiest.median)}") + "\n"
            )
            reached &= ratio.median <= TARGET_RATIO and busiest.median <= TARGET_BUSIEST
    head = ["variant", "TTFT p50 of later turns, ms", f"over {variants[0].name}'s", "busiest worker over the mean"]
    shown = f"{table(head, rows)}\n\nmedian (10th to 90th percentile) over seeds; {deployments.measured}\n{says}"
    title = f"conversations, {args.turns} turns up to {args.prompt} tokens, {args.seeds} seeds of {args.seconds:g} s"
    results = {"measured": deployments.measured.told(), "variants": [one.told() for one in variants], "runs": runs}
    finish(title, shown, results, args.json)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
