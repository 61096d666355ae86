"""``kvbelt doctor``: before a start, and of a running deployment.

Exit status: 0 nothing is wrong, 1 warnings, 2 errors (or a command line that cannot be understood).
"""

import argparse
import asyncio
import sys
from pathlib import Path

from kvbelt.errors import SettingsError
from kvbelt.ops.arguments import port, positive_int, positive_number
from kvbelt.ops.console import wants_colour
from kvbelt.ops.doctor import before, gather, report
from kvbelt.ops.doctor.asking import address_of
from kvbelt.ops.doctor.checks import before as checks_before
from kvbelt.ops.doctor.checks import diagnose
from kvbelt.ops.doctor.finding import Finding, status_of
from kvbelt.ops.model_dir import find_model
from kvbelt.ops.ports import PROXY_PORT
from kvbelt.ops.proxy_client import add_key_argument, key_of
from kvbelt.ops.topology import Topology


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that ``kvbelt doctor`` takes."""
    parser.description = (
        "With --url: what is wrong with a running deployment. Without: whether this machine, the files and the ports "
        "are "
        "fit for a start."
    )
    parser.add_argument("topology", nargs="?", help="XpYd, as for kvbelt up: whether its ports are free, and its ratio")
    parser.add_argument("--url", help="the proxy of a running deployment, e.g. http://127.0.0.1:9100")
    parser.add_argument("--config", type=Path, action="append", default=[], metavar="FILE", nargs="+",
                        help="the YAML files of the workers")  # fmt: skip
    parser.add_argument("--model", help="a Hugging Face folder, or 'demo': whether the buffers fit its KV")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the KV (default: auto)"
    )
    parser.add_argument("--max-model-len", type=positive_int, help="default: the model's")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: auto")
    parser.add_argument("--port", type=port, default=PROXY_PORT, help="the proxy's to be (default: 9100)")
    parser.add_argument("--no-measure", action="store_true", help="start no two processes to measure NIXL with")
    parser.add_argument(
        "--seconds", type=positive_number, default=3.0, help="how long to look at a running deployment (default: 3)"
    )
    parser.add_argument(
        "--no-probe", action="store_true", help="send no prompt of 64 tokens through each pair of a running deployment"
    )
    add_key_argument(parser)
    parser.add_argument("--json", action="store_true", help="findings for programs")


def run(args: argparse.Namespace) -> int:
    """``kvbelt doctor`` with parsed arguments. Returns the exit status.

    Raises:
        SettingsError: arguments that contradict each other, a topology or a model that is none.
    """
    if args.url is not None:
        given = [name for name in ("topology", "model") if getattr(args, name) is not None] + (
            ["--config"] if args.config else []
        )
        if given:
            raise SettingsError(
                f"--url looks at a running deployment, {given[0]} at one that is to be started; give one of the two"
            )
        findings, what = _running(args)
    else:
        findings, what = _before(args)
    if args.json:
        print(report.as_json(findings, what))
    else:
        for line in report.lines(findings, what, colour=wants_colour(sys.stdout)):
            print(line)
    return status_of(findings)


def _running(args: argparse.Namespace) -> tuple[list[Finding], str]:
    host, number = address_of(args.url)
    how = gather.Looking(seconds=args.seconds, probe=not args.no_probe, admin_key=key_of(args))
    evidence = asyncio.run(gather.look(args.url, host, number, how))
    prefill, decode = len(list(evidence.of("prefill"))), len(list(evidence.of("decode")))
    what = f"{args.url}: {prefill}p{decode}d, {len(evidence.records)} requests in the last minutes"
    return diagnose(evidence), what


def _before(args: argparse.Namespace) -> tuple[list[Finding], str]:
    files = [file for group in args.config for file in group]
    wanted = before.Wanted(
        topology=Topology.parse(args.topology) if args.topology else None,
        files=files,
        model=find_model(args.model) if args.model else None,
        dtype=args.dtype,
        device=args.device,
        max_model_len=args.max_model_len,
        port=args.port,
        measure=not args.no_measure,
    )
    seen = asyncio.run(before.look(wanted))
    parts = ["this machine", *([str(wanted.topology)] if wanted.topology else []), *(map(str, files))]
    return checks_before.diagnose(seen), "before a start: " + ", ".join(parts)
