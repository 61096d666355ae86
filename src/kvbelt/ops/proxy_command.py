"""``kvbelt proxy``: the OpenAI API in front of the workers."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvbelt.errors import SettingsError
from kvbelt.limits import limits_of
from kvbelt.ops.arguments import (
    add_limits,
    add_placement,
    add_worker_key,
    count,
    hosts,
    origins,
    port,
    ports,
    positive_int,
    positive_number,
    worker_key_of,
)
from kvbelt.ops.parser import add_examples

if TYPE_CHECKING:
    from kvbelt.security.keys import Keys

_KEYS = "--key-file keys/proxy.key_secret --trusted-keys-dir keys/trusted"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_addresses(parser)
    keys = parser.add_argument_group("keys")
    add_worker_key(keys)
    add = keys.add_argument
    add(
        "--key-file", type=Path, metavar="FILE", help="this proxy's secret key, made by kvbelt keys new (default: none)"
    )
    add("--trusted-keys-dir", type=Path, metavar="DIR", help="the prefill workers' public keys (default: none)")
    add("--insecure", action="store_true", help="accept notifications beyond loopback without keys")
    add(
        "--admin-key-file", type=Path, metavar="FILE", help="the key for changes to workers (default: none; no changes)"
    )
    add_placement(parser.add_argument_group("placement"))
    limits = parser.add_argument_group("limits")
    add = limits.add_argument
    add("--deadline", type=positive_number, default=600.0, metavar="SECONDS", help="longest time of a request")
    add(
        "--health-timeout", type=positive_number, default=3.0, metavar="SECONDS",
        help="a worker that answers no health check for so long gets no new requests",
    )  # fmt: skip
    add(
        "--drain-seconds", type=positive_number, default=30.0, metavar="SECONDS",
        help="time for open requests at shutdown",
    )  # fmt: skip
    add(
        "--max-waiting", type=positive_int, default=1024, metavar="N",
        help="requests that may wait for a worker; a further one gets 429",
    )  # fmt: skip
    add(
        "--max-wait-seconds", type=positive_number, default=30.0, metavar="SECONDS",
        help="a request that has waited so long for a worker gets 429",
    )  # fmt: skip
    add_limits(limits)
    _add_records(parser)
    add_examples(
        parser,
        ("kvbelt proxy --prefill-port 7100,7101 --decode-port 7200", "three workers on this host"),
        (f"kvbelt proxy --prefill-host 10.0.0.5 --decode-host 10.0.0.7 {_KEYS}", "two workers on two hosts, with keys"),
    )


def _add_addresses(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("addresses").add_argument
    add("--host", default="127.0.0.1", help="the address to listen on")
    add("--port", type=port, default=9100, help="the port to listen on")
    # The second names are those of LMCache's proxy.
    for kind, other, word, first in (
        ("prefill", "prefiller", "prefillers", 7100), ("decode", "decoder", "decoders", 7200),
    ):  # fmt: skip
        add(f"--{kind}-host", f"--{other}-host", type=hosts, default=["localhost"], metavar="HOST[,HOST]",
            help=f"the {kind} workers' hosts")  # fmt: skip
        add(f"--{kind}-port", f"--{other}-port", type=ports, default=[first], metavar="PORT[,PORT]",
            help="one for all of them, or one for each")  # fmt: skip
        add(f"--num-{word}", type=count, metavar="N", help="how many, on consecutive ports (default: 1)")
    add(
        "--discover", action="store_true", help="the hosts are DNS names, looked up regularly; each address is a worker"
    )
    for name in ("init", "alloc"):
        about = "taken for LMCache's command lines (default: what decode workers tell, which is always used)"
        add(f"--decoder-{name}-port", type=ports, metavar="PORT[,PORT]", help=about)
    add("--notify-host", "--proxy-host", default="127.0.0.1", metavar="HOST", help="where workers report transfers")
    add("--notify-port", "--proxy-port", type=port, default=7500, metavar="PORT", help="and at which port")


def _add_records(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("records, logs and traces").add_argument
    add(
        "--keep-requests", type=positive_int, default=1000, metavar="N",
        help="how many requests kvbelt why and the console can show",
    )  # fmt: skip
    add(
        "--record-prompts", type=count, nargs="?", const=500, default=0, metavar="CHARACTERS",
        help="keep the start of each prompt in its record (default: none; without a number: 500)",
    )  # fmt: skip
    add("--open-console", action="store_true", help="show requests to every client, without a key")
    add(
        "--allowed-origins", type=origins, default=("*",), metavar="ORIGIN[,ORIGIN]",
        help="web pages that may use this server, as https://HOST[:PORT] (default: *, all; '': none)",
    )  # fmt: skip
    add(
        "--log-requests", type=count, default=20, metavar="N",
        help="at most N log lines a second about requests; more are only counted (default: %(default)s; 0: none)",
    )  # fmt: skip
    add(
        "--otlp-endpoint", metavar="URL",
        help="send a trace of each request to this OTLP/HTTP receiver, e.g. http://127.0.0.1:4318 (default: "
        "$OTEL_EXPORTER_OTLP_ENDPOINT, else no traces)",
    )  # fmt: skip
    add("--trace-ratio", type=float, metavar="0..1", help="share of requests to trace (default: all)")
    add("--log-json", action="store_true", help="write the log as JSON, one object a line")


def run(args: argparse.Namespace) -> int:
    from kvbelt.proxy.app import run_proxy
    from kvbelt.proxy.observe.tracer import wish_of
    from kvbelt.proxy.settings import ProxySettings, addresses_of
    from kvbelt.routing.placement import Mode
    from kvbelt.security.admin_key import load_admin_key

    for name in ("init", "alloc"):
        if getattr(args, f"decoder_{name}_port") is not None:
            print(f"--decoder-{name}-port is ignored: decode workers tell their ports themselves", file=sys.stderr)
    endpoint, ratio = wish_of(os.environ)
    settings = ProxySettings(
        decode=addresses_of("decode", args.decode_host, args.decode_port, args.num_decoders),
        prefill=addresses_of("prefill", args.prefill_host, args.prefill_port, args.num_prefillers),
        host=args.host,
        port=args.port,
        notification_host=args.notify_host,
        notification_port=args.notify_port,
        deadline_seconds=args.deadline,
        health_timeout_seconds=args.health_timeout,
        placement=Mode(args.placement),
        min_prompt_tokens=args.min_prompt_tokens,
        slo_ttft_ms=args.slo_ttft_ms,
        slo_itl_ms=args.slo_itl_ms,
        slo_tpot_ms=args.slo_tpot_ms,
        max_waiting=args.max_waiting,
        max_wait_seconds=args.max_wait_seconds,
        limits=limits_of(args.limit),
        records_kept=args.keep_requests,
        record_prompts=args.record_prompts,
        open_console=args.open_console,
        allowed_origins=args.allowed_origins,
        drain_seconds=args.drain_seconds,
        discover=args.discover,
        request_lines_per_second=args.log_requests,
        otlp_endpoint=args.otlp_endpoint or endpoint,
        trace_ratio=args.trace_ratio if args.trace_ratio is not None else ratio,
        keys=_proxy_keys(args.key_file, args.trusted_keys_dir, insecure=args.insecure),
        insecure=args.insecure,
        admin_key=load_admin_key(args.admin_key_file) if args.admin_key_file is not None else None,
        worker_api_key=worker_key_of(args),
    )
    run_proxy(settings, log_json=args.log_json)
    return 0


def _proxy_keys(key_file: Path | None, trusted_dir: Path | None, *, insecure: bool) -> "Keys | None":
    if key_file is None and trusted_dir is None:
        return None
    if key_file is None or trusted_dir is None:
        raise SettingsError("--key-file and --trusted-keys-dir belong together; one of them is missing")
    if insecure:
        raise SettingsError("--insecure and --key-file contradict each other; remove one of them")
    from kvbelt.security.keys import load_keys

    return load_keys(key_file, trusted_dir)
