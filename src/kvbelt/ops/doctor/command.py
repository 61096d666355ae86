"""``kvbelt doctor``: before a start, or on a running deployment.

Exit status: 0 without a problem, 1 for warnings, 2 for errors or a wrong command line.
"""

import argparse
import asyncio
import shutil
import sys
from pathlib import Path

from kvbelt.errors import SettingsError
from kvbelt.ops.arguments import add_worker_key, port, positive_int, positive_number, worker_key_of
from kvbelt.ops.doctor import gather, preflight, report
from kvbelt.ops.doctor.checks import diagnose
from kvbelt.ops.doctor.checks import preflight as preflight_checks
from kvbelt.ops.doctor.finding import Finding, status_of
from kvbelt.ops.http_client import Address
from kvbelt.ops.model_dir import find_model
from kvbelt.ops.parser import add_examples
from kvbelt.ops.ports import PROXY_PORT
from kvbelt.ops.proxy_client import (
    URL_VARIABLE,
    add_key_argument,
    add_url_argument,
    key_of,
    url_of_environment,
    url_of_running,
)
from kvbelt.ops.terminal import wants_colour
from kvbelt.ops.topology import Topology


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Find what is wrong with the deployment that runs. With a topology, files or a model, or where\n"
        "none runs: check this machine, the files and the ports before a start."
    )
    parser.add_argument("topology", nargs="?", help="XpYd, as for kvbelt up: check its ports, memory and cores")
    add_url_argument(parser)
    parser.add_argument("--config", type=Path, action="append", default=[], metavar="FILE", nargs="+",
                        help="the YAML files of the workers")  # fmt: skip
    parser.add_argument(
        "--model", help="a Hugging Face folder, or 'demo': check the buffers against its KV (default: not checked)"
    )
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the KV (default: auto)"
    )
    parser.add_argument(
        "--max-model-len", type=positive_int, metavar="TOKENS", help="longest prompt plus answer (default: the model's)"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: auto")
    parser.add_argument("--port", type=port, default=PROXY_PORT, help="the proxy's port (default: 9100)")
    parser.add_argument("--no-measure", action="store_true", help="do not start two processes to measure NIXL")
    parser.add_argument(
        "--seconds", type=positive_number, default=3.0, help="how long to observe a running deployment (default: 3)"
    )
    parser.add_argument(
        "--no-probe",
        action="store_true",
        help="send no prompt of 64 tokens through each pair and measure no link",
    )
    add_key_argument(parser)
    add_worker_key(parser)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    add_examples(
        parser,
        ("kvbelt doctor 2p2d --model demo", "would this start here?"),
        ("kvbelt doctor", "what is wrong with what runs?"),
        ("kvbelt doctor --config prefill.yaml decode.yaml", "do these two files fit each other?"),
    )


def run(args: argparse.Namespace) -> int:
    planned = [name for name in ("topology", "model") if getattr(args, name) is not None] + (
        ["--config"] if args.config else []
    )
    if args.url is not None and planned:
        raise SettingsError(
            f"--url checks a running deployment, {planned[0]} a deployment before its start; give one of the two"
        )
    url = None if planned else _url_of(args)
    findings, what = _preflight(args, planned=bool(planned)) if url is None else _running(args, url)
    if args.json:
        print(report.as_json(findings, what))
    else:
        width = min(shutil.get_terminal_size((report.WIDTH, 24)).columns, report.WIDTH)
        for line in report.lines(findings, what, colour=wants_colour(sys.stdout), width=width):
            print(line)
    return status_of(findings)


def _url_of(args: argparse.Namespace) -> str | None:
    """The proxy that is named, or that answers where other commands look for one; None: there is none."""
    if named := args.url or url_of_environment():
        return str(named)
    url = url_of_running() if args.port == PROXY_PORT else f"http://127.0.0.1:{args.port}"
    return url if asyncio.run(gather.is_proxy(Address.of_url(url))) else None


def _running(args: argparse.Namespace, url: str) -> tuple[list[Finding], str]:
    how = gather.GatherOptions(
        seconds=args.seconds, probe=not args.no_probe, admin_key=key_of(args), worker_api_key=worker_key_of(args)
    )
    evidence = asyncio.run(gather.gather_evidence(url, Address.of_url(url), how))
    prefill, decode = len(list(evidence.of("prefill"))), len(list(evidence.of("decode")))
    what = f"{url}: {prefill}p{decode}d, {len(evidence.records)} requests in the last minutes"
    return diagnose(evidence), what


def _preflight(args: argparse.Namespace, *, planned: bool) -> tuple[list[Finding], str]:
    files = [file for group in args.config for file in group]
    options = preflight.PreflightOptions(
        topology=Topology.parse(args.topology) if args.topology else None,
        files=files,
        model=find_model(args.model) if args.model else None,
        dtype=args.dtype,
        device=args.device,
        max_model_len=args.max_model_len,
        port=args.port,
        measure=not args.no_measure,
    )
    seen = asyncio.run(preflight.inspect(options))
    parts = ["this machine", *([str(options.topology)] if options.topology else []), *(map(str, files))]
    what = "before a start: " + ", ".join(parts)
    if not planned:
        what = f"no deployment runs at http://127.0.0.1:{args.port}; --url or {URL_VARIABLE} names another\n{what}"
    return preflight_checks.diagnose(seen), what
