"""``kvbelt worker``: one worker with the embedded engine."""

import argparse
import contextlib
import gc
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from kvbelt.errors import KVBeltError
from kvbelt.limits import limits_of
from kvbelt.ops.arguments import add_limits, port, positive_int, positive_number
from kvbelt.ops.parser import add_examples
from kvbelt.wire.health import Role


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--role", choices=[role.value for role in Role], help="what it does (default: as pd_role of the file says)")
    add("--model", required=True, metavar="DIR", help="a Hugging Face folder, or 'demo'")
    add("--served-model-name", metavar="NAME", help="what requests call the model (default: the folder's name)")
    add(
        "--config",
        type=Path,
        metavar="FILE.yaml",
        help="the file with its role and how KV travels (default: $LMCACHE_CONFIG_FILE)",
    )
    add("--host", default="127.0.0.1", help="where the proxy reaches it")
    add("--port", type=port, default=None, help="its port (default: 7100 prefill, 7200 decode)")
    add("--log-json", action="store_true", help="write the log as JSON, one object a line")
    add = parser.add_argument_group("engine").add_argument
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where the model computes")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of weights and KV")
    add("--kv-gb", type=positive_number, metavar="GB", help="memory for KV blocks (default: by what is free)")
    add("--block-size", type=positive_int, default=16, metavar="TOKENS", help="tokens of a block")
    add(
        "--max-model-len", type=positive_int, metavar="TOKENS", help="longest prompt plus answer (default: the model's)"
    )
    add(
        "--max-batch-tokens", type=positive_int, metavar="TOKENS",
        help="most tokens of a step, prefill chunks included (default: 512)",
    )  # fmt: skip
    add("--max-running", type=positive_int, metavar="N", help="most requests that run at once (default: 64)")
    add(
        "--slo-itl-ms", type=positive_number, metavar="MS",
        help="service level of requests that name none: time between tokens; prompts are computed in pieces so that "
        "requests beside them keep it (default: none)",
    )  # fmt: skip
    add("--threads", type=positive_int, metavar="N", help="CPU threads of the model (default: torch's choice)")
    add("--no-prefix-caching", action="store_true", help="compute every prompt in full; reuse no cached prefix")
    limits = parser.add_argument_group("what requests may do")
    add_limits(limits)
    limits.add_argument(
        "--trust-request-chat-template", action="store_true",
        help="run chat templates that requests bring: programs of any length, so only for clients that you trust",
    )  # fmt: skip
    add_examples(
        parser,
        ("kvbelt worker --config prefill.yaml --model demo", "a prefill worker on port 7100"),
        ("kvbelt worker --config decode-1.yaml --model demo --port 7201", "a second decode worker"),
    )


def run(args: argparse.Namespace) -> NoReturn:
    try:
        _serve_worker(args)
    except KVBeltError as error:
        sys.stderr.write(f"kvbelt: {error}\n")
        _exit_now(2)
    except Exception:  # noqa: BLE001 -- reported as the interpreter would
        traceback.print_exc()
        _exit_now(1)
    _exit_now(0)


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
    from kvbelt.settings import WorkerSettings, belt_for, role_for

    require_engine("kvbelt worker", "embedded")
    role = Role(args.role) if args.role else role_for(args.config)
    belt = belt_for(role, args.config)
    from kvbelt.ops.model_dir import find_model

    model_dir = find_model(args.model)
    gc.disable()  # collections are a fifth of these imports' time, and find nothing
    from kvbelt.worker.main import run_worker

    gc.freeze()
    gc.enable()
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
