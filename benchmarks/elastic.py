"""Placement under Poisson load: 1p1d that splits and answers whole as it pays, against two aggregated servers.

Both have the same number of workers and of threads, run on one machine at the same time, and are loaded in turn with
the same arrivals and prompts. Rates are shares of 0p2d's capacity; levels are multiples of its unloaded times.

Target: the share of requests within both levels is never below 0p2d's less 2 points.

    python -m benchmarks.elastic [--shares 50,80,100] [--seconds 30] [--seeds 5] [--variant '…'] [--json FILE]
"""

import statistics
import sys
from collections import Counter
from contextlib import ExitStack
from typing import Any

from benchmarks._run import figure, finish, note, parser, summarise, table, verdict
from benchmarks._variants import ELASTIC, Deployments, Variant, add_arguments, answers_of, model
from benchmarks.gpu._load import Load, questions
from benchmarks.gpu._rows import Answer, Level, percentile, share_within

VARIANTS = (Variant("0p2d", "0p2d"), Variant("1p1d elastic", "1p1d", ELASTIC))
TARGET_POINTS = -2.0


def figures_of(answers: list[Answer], level: Level) -> dict[str, Any]:
    """One load of one variant."""
    done = [answer for answer in answers if not answer.error]
    ttft, tpot = [answer.ttft for answer in done], [answer.tpot for answer in done]
    return {
        "within_percent": 100 * share_within(answers, level),
        "ttft_ms": {"p50": percentile(ttft, 0.5), "p99": percentile(ttft, 0.99)},
        "tpot_ms": {"p50": percentile(tpot, 0.5), "p99": percentile(tpot, 0.99)},
        "requests": len(answers),
        "errors": len(answers) - len(done),
        "client_lag_ms": max(answer.lag for answer in answers),
        "actions": dict(Counter(answer.action for answer in done)),
    }


def row_of(runs: list[dict[str, Any]], first: list[dict[str, Any]]) -> tuple[list[str], float]:
    """The cells of one variant at one rate, and its points above the first variant, in the median."""
    within = summarise(run["within_percent"] for run in runs)
    pairs = zip(runs, first, strict=True)
    points = summarise(run["within_percent"] - other["within_percent"] for run, other in pairs)
    actions = sum((Counter(run["actions"]) for run in runs), Counter[str]())
    times = [(kind, name) for kind in ("ttft_ms", "tpot_ms") for name in ("p50", "p99")]
    return [
        f"{runs[0]['share']} %",
        figure(runs[0]["rate"]),
        runs[0]["variant"],
        f"{within.median:.1f} ({within.low:.1f} to {within.high:.1f})",
        f"{points.median:+.1f} ({points.low:+.1f} to {points.high:+.1f})",
        *(figure(statistics.median(run[kind][name] for run in runs)) for kind, name in times),
        ", ".join(f"{action}: {count}" for action, count in actions.most_common()),
    ], points.median


def main() -> int:
    """Measure and print. Status 1 if the target was missed."""
    arguments = parser(__doc__)
    add_arguments(arguments, VARIANTS, prompt=1000)
    arguments.add_argument("--shares", default="50,80,100", help="of the first variant's capacity, in percent")
    args = arguments.parse_args()
    variants = args.variant or VARIANTS
    shares = [int(share) for share in args.shares.split(",")]
    runs: list[dict[str, Any]] = []
    with ExitStack() as stack:
        deployments = Deployments(stack, variants, args)
        measured = deployments.measured
        for seed in range(1, args.seeds + 1):
            for share in shares:
                note(f"seed {seed} of {args.seeds}, {share} % of the capacity")
                rate = measured.capacity * share / 100
                asked = questions(Load("poisson", rate, args.seconds, args.prompt, args.answer), seed, model().name)
                for variant, deployment in deployments.in_turn(seed):
                    run = {"share": share, "rate": rate, "seed": seed, "variant": variant.name}
                    runs.append(run | figures_of(answers_of(deployment, asked), measured.level))
    rows, worst = [], float("inf")
    for share in shares:
        of = {one.name: [r for r in runs if (r["share"], r["variant"]) == (share, one.name)] for one in variants}
        for one in variants:
            cells, points = row_of(of[one.name], of[variants[0].name])
            rows.append(cells)
            worst = min(worst, points)
    head = ["load", "req/s", "variant", "within, %", f"points above {variants[0].name}"]
    shown = table([*head, "TTFT p50", "p99", "TPOT p50", "p99", "actions"], rows)
    shown += f"\n\nmedian (10th to 90th percentile) over seeds, points of the same seed; times in ms\n{measured}\n"
    reached = worst >= TARGET_POINTS
    shown += verdict(reached, f"{worst:+.1f} points in the worst median, target {TARGET_POINTS:+.1f}")
    title = f"elastic, {args.prompt}/{args.answer} tokens, {args.seeds} seeds of {args.seconds:g} s"
    results = {"measured": measured.told(), "variants": [one.told() for one in variants], "runs": runs}
    finish(f"{title}, {args.threads} threads a worker", shown, results, args.json)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
