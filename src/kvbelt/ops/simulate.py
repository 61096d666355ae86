"""``kvbelt simulate``: what a deployment would do under a load, in a second instead of on GPUs.

The placement is the proxy's own; workers are models of their steps, under a virtual clock. Every policy gets the same
requests. ``docs/placement.md`` says how far the figures may be trusted.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import msgspec

from kvbelt.errors import SettingsError
from kvbelt.ops.arguments import count, positive_int, positive_number
from kvbelt.ops.parser import add_examples
from kvbelt.ops.tables import table
from kvbelt.ops.topology import Topology
from kvbelt.pacing.costs import StepCosts
from kvbelt.routing.levels import ServiceLevels
from kvbelt.routing.placement import Mode
from kvbelt.simulate.load import BURSTINESS, Lengths, Load, read_trace
from kvbelt.simulate.outcome import Judged, Outcome
from kvbelt.simulate.profiles import PROFILES, Profile
from kvbelt.simulate.scenario import FIXED_SPLIT, PLAIN, Deployment, known_policy, simulate

DEFAULT_POLICIES = ("elastic", "whole", "least", "least@2048", "least@512")

MOST_WORKERS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workers", default="1p1d", metavar="XpYd", help="default: %(default)s")
    add(
        "--policy", action="append", type=_policy, metavar="NAME[@TOKENS]",
        help=f"{', '.join(Mode)}, {FIXED_SPLIT}, {', '.join(PLAIN)}; plain ones with the most tokens of a step; "
        f"repeatable (default: {' '.join(DEFAULT_POLICIES)})",
    )  # fmt: skip
    load = parser.add_argument_group("load")
    add = load.add_argument
    add("--rate", type=positive_number, default=4.0, help="requests a second (default: %(default)g)")
    add(
        "--arrivals", type=_burstiness, default="poisson", metavar="KIND",
        help=f"{', '.join(BURSTINESS)}, or a number as vLLM's --burstiness (default: %(default)s)",
    )  # fmt: skip
    add("--seconds", type=positive_number, default=150.0, help="of load (default: %(default)g)")
    add("--seed", type=count, default=1, help="of arrivals and lengths (default: %(default)s)")
    add("--prompt", type=positive_int, default=7500, metavar="TOKENS", help="default: %(default)s")
    add("--output", type=positive_int, default=200, metavar="TOKENS", help="default: %(default)s")
    add("--range-ratio", type=_share, default=0.0, metavar="0..1", help="lengths differ from their mean by up to this")
    add(
        "--mix", type=_mix, metavar="PROMPT/OUTPUT:SHARE,...",
        help="several lengths, e.g. 7500/200:1,2000/1000:2 (default: one, of --prompt and --output)",
    )  # fmt: skip
    add("--turns", type=positive_int, default=1, metavar="N", help="of each conversation; prompts grow by each answer")
    add("--think", type=positive_number, default=10.0, metavar="SECONDS", help="between turns, on average")
    add("--growth", type=positive_int, default=500, metavar="TOKENS", help="new in the prompt of each later turn")
    add(
        "--hot", type=_share, default=0.0, metavar="0..1",
        help="share of requests with one beginning, for nine tenths of the prompt; not with --turns",
    )  # fmt: skip
    add(
        "--trace", type=Path, metavar="FILE.jsonl",
        help="the requests, one a line: arrival (seconds), prompt_tokens, output_tokens, conversation (default: made)",
    )  # fmt: skip
    levels = parser.add_argument_group("service levels")
    add = levels.add_argument
    add("--slo-ttft-ms", type=positive_number, default=500.0, metavar="MS", help="default: %(default)g")
    add(
        "--slo-itl-ms",
        type=positive_number,
        default=50.0,
        metavar="MS",
        help="between two tokens, for 99 of 100; with TTFT it is B (default: %(default)g)",
    )
    add(
        "--slo-tpot-ms",
        type=positive_number,
        default=25.0,
        metavar="MS",
        help="between tokens, on average; with TTFT it is A (default: %(default)g)",
    )
    add("--keep", choices=("itl", "tpot"), default="itl", help="the level that placement keeps (default: %(default)s)")
    workers = parser.add_argument_group("workers")
    add = workers.add_argument
    add("--profile", choices=sorted(PROFILES), default=next(iter(PROFILES)), help="default: %(default)s")
    add(
        "--costs", type=Path, metavar="FILE.json",
        help="step costs in seconds, or a worker's health message with them (default: the profile's)",
    )  # fmt: skip
    add("--max-num-batched-tokens", type=positive_int, metavar="N", help="tokens of a step (default: the profile's)")
    add("--max-num-seqs", type=positive_int, metavar="N", help="requests that run at once (default: the profile's)")
    add("--kv-tokens", type=positive_int, metavar="N", help="KV memory of a worker (default: the profile's)")
    add("--slow", type=_share, default=0.0, metavar="0..1", help="share of each role's workers that are half as fast")
    add("--dies", type=_death, action="append", default=[], metavar="NAME@SECONDS", help="e.g. d0@60; repeatable")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    add_examples(
        parser,
        ("kvbelt simulate --workers 2p2d --rate 12", "what 12 requests a second would meet, by placement"),
        ("kvbelt simulate --workers 0p4d --policy whole --policy least@2048", "four whole servers, two ways to choose"),
    )


def run(args: argparse.Namespace) -> int:
    deployment = _deployment(args)
    ttft, itl, tpot = (milliseconds / 1e3 for milliseconds in (args.slo_ttft_ms, args.slo_itl_ms, args.slo_tpot_ms))
    levels = ServiceLevels(ttft, itl if args.keep == "itl" else None, tpot if args.keep == "tpot" else None)
    outcomes = [
        _simulated(name, deployment, args, levels, Judged(ttft, tpot, itl)) for name in args.policy or DEFAULT_POLICIES
    ]
    print(json.dumps([asdict(one) for one in outcomes], indent=2) if args.json else "\n".join(shown(outcomes)))
    return 0


def shown(outcomes: Sequence[Outcome]) -> list[str]:
    """A table, in milliseconds and percent; the busiest worker over the mean; and what was done with the requests."""
    rows = [
        (
            one.policy,
            f"{one.ttft_p50:.0f} / {one.ttft_p99:.0f} / {one.ttft_max:.0f}",
            f"{one.tpot_p50:.1f} / {one.tpot_p99:.1f}",
            f"{one.itl_p99:.1f}",
            f"{one.within_a:.1f}",
            f"{one.within_b:.1f}",
            f"{one.tokens_per_second:,.0f}",
            f"{one.busiest:.2f}",
            ", ".join(f"{name} {share:.0f}" for name, share in one.actions.items()),
        )
        for one in outcomes
    ]
    head = (
        "policy",
        "TTFT p50 / p99 / max",
        "TPOT p50 / p99",
        "ITL p99",
        "A %",
        "B %",
        "tokens/s",
        "busiest",
        "actions, %",
    )
    return table(head, rows)


def _deployment(args: argparse.Namespace) -> Deployment:
    profile: Profile = PROFILES[args.profile]
    engine = profile.engine
    if args.costs is not None:
        engine = replace(engine, costs=_costs(args.costs))
    given = {
        "most_prompt_tokens": args.max_num_batched_tokens,
        "most_requests": args.max_num_seqs,
        "kv_capacity": args.kv_tokens,
    }
    engine = replace(engine, **{name: value for name, value in given.items() if value is not None})
    topology = Topology.parse(args.workers, most=MOST_WORKERS)
    deployment = Deployment(
        topology.prefill, topology.decode, replace(profile, engine=engine), args.slow, dies=tuple(args.dies)
    )
    names = {spec.name for spec in deployment.specs()}
    for name, _ in args.dies:
        if name not in names:
            raise SettingsError(f"--dies names {name}, which is none of the workers; p0 is the first prefill worker")
    return deployment


def _costs(file: Path) -> StepCosts:
    """Of a file that has them as ``{"base": ...}``, or in ``steps.costs``, as a worker's ``/health``."""
    try:
        found = msgspec.json.decode(file.read_bytes())
        steps = found.get("steps", found)
        return msgspec.convert(steps.get("costs", steps), type=StepCosts)
    except (OSError, AttributeError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise SettingsError(f"--costs {file}: {error}; it needs base, prefill, token, token_context, ...") from error


def _simulated(
    name: str, deployment: Deployment, args: argparse.Namespace, levels: ServiceLevels, judged: Judged
) -> Outcome:
    following = None
    if args.trace is not None:
        try:
            requests = read_trace(args.trace)
        except (OSError, ValueError) as error:
            raise SettingsError(f"--trace: {error}") from error
    else:
        lengths = tuple(
            Lengths(prompt, output, args.range_ratio, share)
            for prompt, output, share in args.mix or [(args.prompt, args.output, 1.0)]
        )
        if args.hot and args.turns > 1:
            raise SettingsError(f"--hot {args.hot:g} and --turns {args.turns} exclude each other; leave one out")
        load = Load(
            args.rate, args.seconds, args.arrivals, lengths, args.seed, args.turns, args.think, args.growth, args.hot
        )
        requests, following = load.requests(), load.following()
    return simulate(name, deployment, requests, following=following, levels=levels, judged=judged, seed=args.seed)


def _policy(text: str) -> str:
    if not known_policy(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no policy; examples: elastic, whole, least@2048, {FIXED_SPLIT}")
    return text


def _burstiness(text: str) -> float:
    return BURSTINESS[text] if text in BURSTINESS else positive_number(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def _mix(text: str) -> list[tuple[int, int, float]]:
    made = []
    for part in text.split(","):
        lengths, _, share = part.partition(":")
        prompt, _, output = lengths.partition("/")
        try:
            made.append((positive_int(prompt), positive_int(output), positive_number(share or "1")))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{part!r} is not of the form PROMPT/OUTPUT:SHARE: {error}") from error
    return made


def _death(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("@")
    try:
        return name, positive_number(seconds)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME@SECONDS, such as d0@60") from error
