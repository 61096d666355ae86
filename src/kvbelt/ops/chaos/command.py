"""``kvbelt chaos``: puts faults in a deployment under load and checks what clients got.

The report goes to standard output, progress to standard error. The first Ctrl-C ends the load and reports what was
found so far; the second ends everything. Exit status: 0 if every invariant held; 1 if one did not, or the run was
interrupted; 2 if it could not be started.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
from pathlib import Path

from kvbelt.errors import KVBeltError, SettingsError, resembling
from kvbelt.ops.arguments import positive_int, positive_number
from kvbelt.ops.chaos import report
from kvbelt.ops.chaos.config import ChaosConfig
from kvbelt.ops.chaos.faults import BY_NAME, KINDS, FaultKind
from kvbelt.ops.chaos.result import Result
from kvbelt.ops.chaos.run import StoppedError
from kvbelt.ops.chaos.run import run as run_config
from kvbelt.ops.extras import require_engine
from kvbelt.ops.http_client import Address
from kvbelt.ops.parser import add_examples
from kvbelt.ops.processes import resolve_device
from kvbelt.ops.proxy_client import URL_VARIABLE, add_key_argument, argument_of, key_of, url_of_environment
from kvbelt.ops.terminal import Terminal
from kvbelt.ops.topology import Topology
from kvbelt.ops.up import prepare_model
from kvbelt.routing.placement import Mode

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = ChaosConfig()
    parser.add_argument("topology", nargs="?", help="what to start: XpYd, e.g. 2p2d; left out with --url")
    parser.add_argument(
        "--url", type=_address, metavar="URL",
        help=f"a running proxy (default: ${URL_VARIABLE}, or none: TOPOLOGY is started)",
    )  # fmt: skip
    parser.add_argument(
        "--reference",
        type=_address,
        metavar="URL",
        help="with --url: an aggregated server for the reference answers (default: the proxy, before the faults)",
    )
    add_key_argument(parser)
    add = parser.add_argument_group("load").add_argument
    add("--minutes", type=positive_number, default=default.seconds / 60, metavar="N", help="duration of the load")
    add("--seed", type=int, help="for faults and questions (default: a new one, which is printed)")
    add("--rate", type=positive_number, help="requests a second (default: by the machine's speed)")
    add("--questions", type=positive_int, default=default.questions, metavar="N", help="how many different prompts")
    add("--longest", type=positive_int, default=default.longest, metavar="TOKENS", help="longest prompts")
    add = parser.add_argument_group("faults").add_argument
    add("--every", type=positive_number, default=default.every, metavar="SECONDS", help="time between faults")
    add("--faults", type=_kinds, default=KINDS, metavar="KIND,…", help="only these kinds; see --list (default: all)")
    add("--list", action="store_true", help="list the kinds of faults and exit")
    add("--no-namespaces", action="store_true", help="run workers on this host, without network faults")
    add = parser.add_argument_group("workers").add_argument
    add("--model", default="tiny", help="tiny, demo, or a Hugging Face folder (default: tiny)")
    add("--max-model-len", type=positive_int, default=default.max_model_len, metavar="TOKENS", help="of the workers")
    add(
        "--placement",
        type=Mode,
        choices=list(Mode),
        default=default.placement,
        help="default: split, so that KV crosses",
    )
    add(
        "--verify",
        choices=["off", "sample", "always"],
        help="the workers' pd_verify (default: theirs); off shows corruption that they would catch",
    )
    add("--dtype", choices=["float32", "bfloat16"], default=default.dtype, help="default: float32")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: auto")
    add = parser.add_argument_group("results").add_argument
    add("--json", type=Path, metavar="FILE", help="also write all results to FILE (default: no)")
    add("--log-dir", type=Path, metavar="DIR", help="also write each process's log to a file there (default: no)")
    add("--verbose", action="store_true", help="show the processes' logs")
    add_examples(
        parser,
        ("kvbelt chaos 2p2d --minutes 2", "two minutes of load and faults on four workers"),
        (
            "kvbelt chaos --url http://127.0.0.1:9100 --minutes 1",
            "load on a deployment that runs, and the faults it can take",
        ),
        ("kvbelt chaos --list", "the kinds of faults"),
    )


def run(args: argparse.Namespace) -> int:
    if args.list:
        for kind in KINDS:
            print(f"{kind.name:22} {kind.what}" + (f" (needs {kind.needs})" if kind.needs else ""))
        return 0
    if args.topology is None and args.url is None and (named := url_of_environment()) is not None:
        args.url = Address.of_url(named)
    if (args.topology is None) == (args.url is None):
        raise SettingsError("give either a topology to start, such as 2p2d, or --url of a proxy that runs")
    if args.topology is not None:
        require_engine("kvbelt chaos without --url", "embedded")
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 16)
    try:
        config = _config(args, seed)
        _log(f"seed {seed}")
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            terminal = Terminal() if args.verbose else Terminal(nowhere)
            result = asyncio.run(_until_signalled(config, terminal))
    except (KeyboardInterrupt, asyncio.CancelledError, StoppedError):
        return 1
    except KVBeltError as error:
        print(f"kvbelt: {error}", file=sys.stderr)
        return 2
    return print_report(result, args.json)


def _config(args: argparse.Namespace, seed: int) -> ChaosConfig:
    return ChaosConfig(
        topology=Topology.parse(args.topology) if args.topology is not None else None,
        url=args.url,
        admin_key=key_of(args) if args.url is not None else None,
        reference_url=args.reference,
        model=prepare_model(args.model, Terminal()) if args.url is None else Path(),
        seconds=args.minutes * 60,
        seed=seed,
        every=args.every,
        rate=args.rate,
        questions=args.questions,
        longest=args.longest,
        kinds=args.faults,
        placement=args.placement,
        namespaces=not args.no_namespaces,
        device=resolve_device(args.device),
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        log_dir=args.log_dir,
        belt={"pd_verify": args.verify} if args.verify is not None else {},
    )


def print_report(result: Result, json_file: Path | None) -> int:
    print("\n".join(report.lines(result)), flush=True)
    if json_file is not None:
        try:
            json_file.write_bytes(report.as_json(result))
        except OSError as error:
            print(f"kvbelt: cannot write {json_file}: {error.strerror}", file=sys.stderr)
            return 2
    return 0 if report.held(result) and not result.interrupted else 1


async def _until_signalled(config: ChaosConfig, terminal: Terminal) -> Result:
    """Run; the first signal ends the load, the second everything."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    work = asyncio.create_task(run_config(config, terminal, _log, stop), name="chaos")

    def signalled() -> None:
        if stop.is_set():
            work.cancel()
        stop.set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, signalled)
    try:
        return await work
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


def _log(line: str) -> None:
    print(f"chaos | {line}", file=sys.stderr, flush=True)


def _address(text: str) -> Address:
    address = Address.of_url(argument_of(text))
    if address.tls:
        raise argparse.ArgumentTypeError(f"{text!r} is HTTPS; say http://HOST:PORT")
    return address


def _kinds(text: str) -> tuple[FaultKind, ...]:
    names = text.split(",")
    for name in names:
        if name not in BY_NAME:
            raise argparse.ArgumentTypeError(f"there is no fault {name!r}{resembling(name, list(BY_NAME))}; see --list")
    return tuple(kind for kind in KINDS if kind.name in names)
