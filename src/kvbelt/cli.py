"""The command line: ``kvbelt worker | proxy | up | demo | doctor | why | top | chaos | keys | workers | deploy``.

What is wrong with a command line or a settings file is one line on standard error and exit status 2.
"""

import argparse
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

from kvbelt import __version__
from kvbelt.errors import KVBeltError, SettingsError
from kvbelt.ops.arguments import count, hosts, port, ports, positive_int, positive_number
from kvbelt.settings import Role, resembling

if TYPE_CHECKING:
    from kvbelt.security.keys import Keys


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line and a hint at the option that was meant."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def unknown(self, argument: str) -> NoReturn:
        """Refuse an argument that this command does not have."""
        known = [flag for action in self._actions for flag in action.option_strings]
        self.error(f"unknown argument {argument}{resembling(argument.partition('=')[0], known)}")


def _add_worker(commands: "argparse._SubParsersAction[_Parser]") -> None:
    worker = commands.add_parser("worker", help="one prefill or decode worker with the embedded engine")
    worker.set_defaults(run=_run_worker, parser=worker)
    worker.add_argument("--role", required=True, choices=[role.value for role in Role])
    worker.add_argument("--config", type=Path, metavar="FILE.yaml", help="default: $LMCACHE_CONFIG_FILE")
    worker.add_argument("--model", required=True, help="a Hugging Face folder, or 'demo'")
    worker.add_argument("--served-model-name", help="default: the folder's name")
    worker.add_argument("--host", default="127.0.0.1")
    worker.add_argument("--port", type=port, default=None, help="default: 7100 prefill, 7200 decode")
    worker.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    worker.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    worker.add_argument("--kv-gb", type=positive_number, help="memory for KV blocks, in GB")
    worker.add_argument("--block-size", type=positive_int, default=16, help="tokens a block")
    worker.add_argument("--max-model-len", type=positive_int, help="default: the model's")
    worker.add_argument("--max-batch-tokens", type=positive_int, help="tokens a step, prefill chunks included")
    worker.add_argument("--max-running", type=positive_int, help="requests a step")
    worker.add_argument("--threads", type=positive_int, help="CPU threads of the model")
    worker.add_argument(
        "--no-prefix-caching", action="store_true", help="compute every prompt whole, whatever was computed before"
    )
    worker.add_argument("--log-json", action="store_true", help="the log's lines are JSON objects")


def _run_worker(args: argparse.Namespace) -> NoReturn:
    """A worker, to the end of its process."""
    try:
        _serve_worker(args)
    except KVBeltError as error:
        _end_process(_tell(error))
    except Exception:  # noqa: BLE001 -- as the interpreter would end
        traceback.print_exc()
        _end_process(1)
    _end_process(0)


def _tell(error: KVBeltError) -> int:
    sys.stderr.write(f"kvbelt: {error}\n")
    return 2


def _end_process(status: int) -> NoReturn:
    """End now, and let no native library say farewell.

    UCX, which NIXL brings, loads libnl, which crashes when the C library takes it down (``rtnl_tc_unregister``; nixl
    1.5.1 beside Debian's libibverbs): an orderly end would become status 139. A model that is still being loaded
    aborts when the interpreter is taken down under it.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


def _serve_worker(args: argparse.Namespace) -> None:
    from kvbelt.settings import WorkerSettings, belt_for

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
            threads=args.threads,
            prefix_caching=not args.no_prefix_caching,
            log_json=args.log_json,
        )
    )


def _add_proxy(commands: "argparse._SubParsersAction[_Parser]") -> None:
    proxy = commands.add_parser("proxy", help="the OpenAI API in front of prefill and decode workers")
    proxy.set_defaults(run=_run_proxy, parser=proxy)
    proxy.add_argument("--host", default="127.0.0.1", help="where to listen")
    proxy.add_argument("--port", type=port, default=9100)
    for kind, word, first in (("prefill", "prefillers", 7100), ("decode", "decoders", 7200)):
        proxy.add_argument(f"--{kind}-host", type=hosts, default=["localhost"], metavar="HOST[,HOST]")
        proxy.add_argument(f"--{kind}-port", type=ports, default=[first], metavar="PORT[,PORT]")
        proxy.add_argument(f"--num-{word}", type=count, metavar="N", help="on consecutive ports (default: 1)")
    proxy.add_argument(
        "--discover",
        action="store_true",
        help="the hosts are DNS names, looked up again and again: each address that one has is a worker",
    )
    proxy.add_argument("--notify-host", default="127.0.0.1", help="where prefill workers report transfers")
    proxy.add_argument("--notify-port", type=port, default=7500)
    proxy.add_argument("--key-file", type=Path, metavar="FILE", help="this proxy's secret key (kvbelt keys new)")
    proxy.add_argument("--trusted-keys-dir", type=Path, metavar="DIR", help="public keys of the prefill workers")
    proxy.add_argument("--insecure", action="store_true", help="take notifications beyond loopback without keys")
    proxy.add_argument(
        "--admin-key-file", type=Path, metavar="FILE", help="the key that workers are added and removed with"
    )
    proxy.add_argument("--deadline", type=positive_number, default=600.0, help="seconds a request may take")
    proxy.add_argument(
        "--drain-seconds", type=positive_number, default=2.0, help="for open requests at the end (default: %(default)g)"
    )
    proxy.add_argument("--min-prompt-tokens", type=count, default=0, help="shorter prompts are not disaggregated")
    proxy.add_argument(
        "--keep-requests", type=positive_int, default=1000, metavar="N",
        help="requests that kvbelt why and the console know of (default: %(default)s)",
    )  # fmt: skip
    proxy.add_argument(
        "--record-prompts", type=count, nargs="?", const=500, default=0, metavar="CHARACTERS",
        help="keep the beginning of each prompt with its record (default: none; without a number: 500)",
    )  # fmt: skip
    proxy.add_argument(
        "--open-console", action="store_true", help="whoever reaches this proxy may see its requests, without a key"
    )
    proxy.add_argument(
        "--log-requests",
        type=count,
        default=20,
        metavar="N",
        help="lines a second with requests' TTFT, at most; the others are counted (default: %(default)s; 0: none)",
    )
    proxy.add_argument(
        "--otlp-endpoint", metavar="URL",
        help="send a trace of each request to this OTLP/HTTP receiver, as http://127.0.0.1:4318 (default: "
        "$OTEL_EXPORTER_OTLP_ENDPOINT; without either there are no traces)",
    )  # fmt: skip
    proxy.add_argument(
        "--trace-ratio", type=float, metavar="0..1", help="share of the requests that is traced (default: all)"
    )
    proxy.add_argument("--log-json", action="store_true", help="the log's lines are JSON objects")


def _run_proxy(args: argparse.Namespace) -> int:
    from kvbelt.proxy.addresses import addresses_of
    from kvbelt.proxy.main import run_proxy
    from kvbelt.proxy.settings import ProxySettings
    from kvbelt.proxy.tracer import wish_of
    from kvbelt.security.admin_key import load_admin_key

    endpoint, ratio = wish_of(os.environ)
    settings = ProxySettings(
        decode=addresses_of("decode", args.decode_host, args.decode_port, args.num_decoders),
        prefill=addresses_of("prefill", args.prefill_host, args.prefill_port, args.num_prefillers),
        host=args.host,
        port=args.port,
        notification_host=args.notify_host,
        notification_port=args.notify_port,
        deadline_seconds=args.deadline,
        min_prompt_tokens=args.min_prompt_tokens,
        records_kept=args.keep_requests,
        record_prompts=args.record_prompts,
        open_console=args.open_console,
        drain_seconds=args.drain_seconds,
        discover=args.discover,
        request_lines_per_second=args.log_requests,
        otlp_endpoint=args.otlp_endpoint or endpoint,
        trace_ratio=args.trace_ratio if args.trace_ratio is not None else ratio,
        keys=_proxy_keys(args.key_file, args.trusted_keys_dir, insecure=args.insecure),
        insecure=args.insecure,
        admin_key=load_admin_key(args.admin_key_file) if args.admin_key_file is not None else None,
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
    new = words.add_parser("new", help="make keys: DIR/NAME.key_secret for one process each, DIR/trusted for all")
    new.add_argument("dir", type=Path, metavar="DIR")
    new.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="one a process (default: proxy prefill decode); the proxy's must be proxy",
    )
    new.set_defaults(run=_run_keys_new, parser=new)


def _run_keys_new(args: argparse.Namespace) -> int:
    from kvbelt.security.keys import PROXY, write_new_keys

    for file in write_new_keys(args.dir, args.names or [PROXY, "prefill", "decode"]):
        print(file)
    return 0


class _Command(Protocol):
    """A module that is a command."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """What it takes."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it. Returns the exit status."""


def _add(commands: "argparse._SubParsersAction[_Parser]", name: str, command: _Command, about: str) -> None:
    parser = commands.add_parser(name, help=about)
    command.add_arguments(parser)
    parser.set_defaults(run=command.run, parser=parser)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Parsed arguments carry ``run``, what to do, and ``parser``, whose they are."""
    from kvbelt.ops import demo, top, up, why, workers
    from kvbelt.ops.chaos import command as chaos
    from kvbelt.ops.deploy import command as deploy
    from kvbelt.ops.doctor import command as doctor

    parser = _Parser(prog="kvbelt", description="Disaggregated prefill for LLM serving.")
    parser.add_argument("--version", action="version", version=f"kvbelt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    _add_worker(commands)
    _add_proxy(commands)
    _add(commands, "up", up, "start a whole deployment: workers, belt and proxy")
    _add(commands, "demo", demo, "1p1d, one chat, and where its time went")
    _add(commands, "doctor", doctor, "what is wrong, its cause first: before a start, or --url of what runs")
    _add(commands, "chaos", chaos, "load and faults on a deployment, and whether its promises held")
    _add_keys(commands)
    about = "list, add, drain and remove the workers of a running proxy"
    workers.add_arguments(commands.add_parser("workers", help=about), _Parser)
    _add(commands, "why", why, "where one request's time went, and why it took its way")
    _add(commands, "top", top, "workers, rates and times of a running proxy, live in a terminal")
    deploy.add_arguments(commands.add_parser("deploy", help="manifests for Kubernetes"), _Parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status."""
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        args.parser.unknown(unknown[0])
    try:
        status: int = args.run(args)
    except KVBeltError as error:
        return _tell(error)
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
