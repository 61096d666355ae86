"""The command line: ``kvbelt worker | proxy | up | demo | doctor | why | top | chaos | ...``.

A wrong argument or settings file is reported in one line on standard error, with exit status 2.
"""

import argparse
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from kvbelt import __version__
from kvbelt.errors import KVBeltError, SettingsError
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
from kvbelt.settings import resembling
from kvbelt.wire.health import Role

if TYPE_CHECKING:
    from kvbelt.security.keys import Keys


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line, with the option that was probably meant."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def unknown(self, argument: str) -> NoReturn:
        known = [flag for action in self._actions for flag in action.option_strings]
        self.error(f"unknown argument {argument}{resembling(argument.partition('=')[0], known)}")


def _add_worker(commands: "argparse._SubParsersAction[_Parser]") -> None:
    worker = commands.add_parser("worker", help="one prefill or decode worker with the embedded engine")
    worker.set_defaults(run=_run_worker, parser=worker)
    add = worker.add_argument
    add("--role", required=True, choices=[role.value for role in Role])
    add("--config", type=Path, metavar="FILE.yaml", help="default: $LMCACHE_CONFIG_FILE")
    add("--model", required=True, help="a Hugging Face folder, or 'demo'")
    add("--served-model-name", help="default: the folder's name")
    add("--host", default="127.0.0.1")
    add("--port", type=port, default=None, help="default: 7100 prefill, 7200 decode")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    add("--kv-gb", type=positive_number, help="memory for KV blocks, in GB")
    add("--block-size", type=positive_int, default=16, help="tokens per block")
    add("--max-model-len", type=positive_int, help="default: the model's")
    add("--max-batch-tokens", type=positive_int, help="tokens per step, prefill chunks included")
    add("--max-running", type=positive_int, help="requests per step")
    add(
        "--slo-itl-ms", type=positive_number, metavar="MS",
        help="level between tokens of requests that name none: prompts beside them are cut to it (default: none)",
    )  # fmt: skip
    add("--threads", type=positive_int, help="CPU threads for the model")
    add("--no-prefix-caching", action="store_true", help="compute every prompt in full; reuse no cached prefix")
    add("--log-json", action="store_true", help="write the log as JSON, one object a line")
    add_limits(worker)
    add(
        "--trust-request-chat-template", action="store_true",
        help="run chat templates that requests bring: programs of any length, so only for clients that you trust",
    )  # fmt: skip


def _run_worker(args: argparse.Namespace) -> NoReturn:
    try:
        _serve_worker(args)
    except KVBeltError as error:
        _exit_now(_report(error))
    except Exception:  # noqa: BLE001 -- reported as the interpreter would
        traceback.print_exc()
        _exit_now(1)
    _exit_now(0)


def _report(error: KVBeltError) -> int:
    sys.stderr.write(f"kvbelt: {error}\n")
    return 2


def _exit_now(status: int) -> NoReturn:
    """Exit immediately, skipping native atexit handlers.

    UCX, which NIXL loads, brings libnl. Its destructor crashes in an orderly exit (``rtnl_tc_unregister``; nixl 1.5.1
    beside Debian's libibverbs), which would turn the status into 139. A model that is still loading would abort the
    interpreter's shutdown, too.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the reader of the stream may be gone
            stream.flush()
    os._exit(status)


def _serve_worker(args: argparse.Namespace) -> None:
    from kvbelt.ops.extras import require_engine
    from kvbelt.settings import WorkerSettings, belt_for

    require_engine("kvbelt worker", "embedded")
    role = Role(args.role)
    belt = belt_for(role, args.config)
    from kvbelt.ops.model_dir import find_model

    model_dir = find_model(args.model)
    from kvbelt.worker.main import run_worker

    run_worker(
        WorkerSettings(
            role=role,
            model_dir=model_dir,
            host=args.host,
            port=args.port or (7200 if role is Role.DECODE else 7100),
            belt=belt,
            served_model_name=args.served_model_name,
            device=args.device,
            dtype=args.dtype,
            kv_gb=args.kv_gb,
            block_size=args.block_size,
            max_model_len=args.max_model_len,
            max_batch_tokens=args.max_batch_tokens,
            max_running=args.max_running,
            limits=limits_of(args.limit),
            slo_itl_ms=args.slo_itl_ms,
            threads=args.threads,
            prefix_caching=not args.no_prefix_caching,
            trust_request_chat_template=args.trust_request_chat_template,
            log_json=args.log_json,
        )
    )


def _add_proxy(commands: "argparse._SubParsersAction[_Parser]") -> None:
    proxy = commands.add_parser("proxy", help="the OpenAI API in front of prefill and decode workers")
    proxy.set_defaults(run=_run_proxy, parser=proxy)
    add = proxy.add_argument
    add("--host", default="127.0.0.1", help="where to listen")
    add("--port", type=port, default=9100)
    # The second names are those of LMCache's proxy.
    for kind, other, word, first in (
        ("prefill", "prefiller", "prefillers", 7100), ("decode", "decoder", "decoders", 7200),
    ):  # fmt: skip
        add(f"--{kind}-host", f"--{other}-host", type=hosts, default=["localhost"], metavar="HOST[,HOST]")
        add(f"--{kind}-port", f"--{other}-port", type=ports, default=[first], metavar="PORT[,PORT]")
        add(f"--num-{word}", type=count, metavar="N", help="on consecutive ports (default: 1)")
    add(
        "--discover", action="store_true", help="the hosts are DNS names, looked up regularly; each address is a worker"
    )
    for name in ("init", "alloc"):
        about = "accepted for LMCache's command lines: decode workers tell their ports themselves"
        add(f"--decoder-{name}-port", type=ports, metavar="PORT[,PORT]", help=about)
    add("--notify-host", "--proxy-host", default="127.0.0.1", help="where workers report transfers")
    add("--notify-port", "--proxy-port", type=port, default=7500)
    add("--key-file", type=Path, metavar="FILE", help="this proxy's secret key (kvbelt keys new)")
    add("--trusted-keys-dir", type=Path, metavar="DIR", help="public keys of the prefill workers")
    add("--insecure", action="store_true", help="accept notifications beyond loopback without keys")
    add("--admin-key-file", type=Path, metavar="FILE", help="the key for adding and removing workers")
    add_worker_key(proxy)
    add("--deadline", type=positive_number, default=600.0, help="longest time of a request, in seconds")
    add(
        "--health-timeout", type=positive_number, default=3.0, metavar="SECONDS",
        help="a worker that answers no health check for so long gets no new requests (default: %(default)g)",
    )  # fmt: skip
    add(
        "--drain-seconds", type=positive_number, default=2.0,
        help="time for open requests at shutdown (default: %(default)g)",
    )  # fmt: skip
    add_placement(proxy)
    add(
        "--max-waiting", type=positive_int, default=1024, metavar="N",
        help="requests that may wait for a worker; a further one gets 429 (default: %(default)s)",
    )  # fmt: skip
    add(
        "--max-wait-seconds", type=positive_number, default=30.0, metavar="S",
        help="a request that has waited so long for a worker gets 429 (default: %(default)g)",
    )  # fmt: skip
    add_limits(proxy)
    add(
        "--keep-requests", type=positive_int, default=1000, metavar="N",
        help="how many requests kvbelt why and the console can show (default: %(default)s)",
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


def _run_proxy(args: argparse.Namespace) -> int:
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


def _add_keys(commands: "argparse._SubParsersAction[_Parser]") -> None:
    keys = commands.add_parser("keys", help="keys for the control sockets")
    words = keys.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    new = words.add_parser("new", help="make keys: DIR/NAME.key_secret for each process, DIR/trusted for all")
    new.add_argument("dir", type=Path, metavar="DIR")
    about = "one per process (default: proxy prefill decode); the proxy's name must be proxy"
    new.add_argument("names", nargs="*", metavar="NAME", help=about)
    new.set_defaults(run=_run_keys_new, parser=new)


def _run_keys_new(args: argparse.Namespace) -> int:
    from kvbelt.security.keys import PROXY, write_new_keys

    for file in write_new_keys(args.dir, args.names or [PROXY, "prefill", "decode"]):
        print(file)
    return 0


def _add(commands: "argparse._SubParsersAction[_Parser]", name: str, command: ModuleType, about: str) -> None:
    """Add a command that a module implements, with ``add_arguments(parser)`` and ``run(args)``, its exit status."""
    parser = commands.add_parser(name, help=about)
    command.add_arguments(parser)
    parser.set_defaults(run=command.run, parser=parser)


def build_parser() -> argparse.ArgumentParser:
    """Build the whole command line. Parsed arguments carry ``run``, a function, and ``parser``, of their command."""
    from kvbelt.ops import demo, simulate, top, up, why, workers
    from kvbelt.ops.chaos import command as chaos
    from kvbelt.ops.deploy import command as deploy
    from kvbelt.ops.doctor import command as doctor

    parser = _Parser(prog="kvbelt", description="Disaggregated prefill for LLM serving.")
    parser.add_argument("--version", action="version", version=f"kvbelt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    _add_worker(commands)
    _add_proxy(commands)
    _add(commands, "up", up, "start a whole deployment: workers, belt and proxy")
    _add(commands, "demo", demo, "start 1p1d, send one chat request, show where its time went")
    _add(commands, "doctor", doctor, "find what is wrong, causes first: before a start, or while it runs (--url)")
    _add(commands, "chaos", chaos, "put load and faults on a deployment and check its guarantees")
    _add_keys(commands)
    about = "list, add, drain and remove the workers of a running proxy"
    workers.add_arguments(commands.add_parser("workers", help=about), _Parser)
    _add(commands, "why", why, "show where one request's time went, and why it took its path")
    _add(commands, "top", top, "watch workers, rates and times of a running proxy in the terminal")
    _add(commands, "simulate", simulate, "compare placements under a load, with a virtual clock instead of GPUs")
    deploy.add_arguments(commands.add_parser("deploy", help="write manifests for Kubernetes"), _Parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        args.parser.unknown(unknown[0])
    try:
        status: int = args.run(args)
    except KVBeltError as error:
        return _report(error)
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
