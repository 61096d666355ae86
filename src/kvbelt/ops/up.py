"""``kvbelt up``: starts a whole deployment with one command, and ends it cleanly.

Standard output gets one line, ``ready URL``, once a request would succeed, unless it is a terminal. Progress, and then
the next steps for a person, go to standard error.
Exit status: 0 after Ctrl-C, SIGTERM or SIGHUP; 1 if a process died before all were ready; 2 if the start was refused
(wrong topology, port taken, no such model).
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from kvbelt.errors import KVBeltError, SettingsError, StartError
from kvbelt.ops.arguments import (
    add_limits,
    add_placement,
    add_worker_key,
    limit_arguments,
    placement_arguments,
    port,
    positive_int,
    positive_number,
    worker_key_of,
)
from kvbelt.ops.banner import banner
from kvbelt.ops.child import GRACE_SECONDS
from kvbelt.ops.config_file import add_config, as_config
from kvbelt.ops.control import controlled
from kvbelt.ops.deployment import Deployment
from kvbelt.ops.ending import Signals, drain
from kvbelt.ops.extras import require_engine, require_vllm_of
from kvbelt.ops.http_client import Address
from kvbelt.ops.model_dir import find_model
from kvbelt.ops.parser import add_examples
from kvbelt.ops.ports import PROXY_PORT, check_free, seed_ports
from kvbelt.ops.processes import DeploymentSpec, resolve_device
from kvbelt.ops.running import age, running_deployments
from kvbelt.ops.start_checks import (
    crowded,
    own_weight_bytes,
    require_device,
    require_memory,
    require_model,
    weight_bytes,
)
from kvbelt.ops.supervisor import NotReadyError
from kvbelt.ops.terminal import Terminal
from kvbelt.ops.topology import Topology
from kvbelt.routing.ratio import lopsided
from kvbelt.security.admin_key import load_admin_key

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

#: For open requests, in an orderly end.
DRAIN_SECONDS = 30.0

#: For processes to end by themselves, after a second signal.
_AT_ONCE_SECONDS = 0.3

#: Time for ``serve`` to end after a signal, out of the 5 s in which everything must be gone.
FINISH_SECONDS = 0.5


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``kvbelt up`` and ``kvbelt demo``."""
    parser.add_argument(
        "--model",
        default="demo",
        help="demo, tiny (random weights), a Hugging Face model's folder, or its name on the hub (default: demo)",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: float32")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: auto")
    parser.add_argument("--threads", type=positive_int, help="CPU threads per worker (default: cores / workers)")
    parser.add_argument(
        "--log-dir", type=Path, metavar="DIR", help="also write each process's log to a file there (default: no)"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "topology",
        nargs="?",
        default="1p1d",
        help="XpYd, e.g. 1p1d or 2p2d; 0p1d is one aggregated server (default: %(default)s)",
    )
    add_model_arguments(parser)
    parser.add_argument("--logs", action="store_true", help="show what the processes log")
    _add_engine(parser)
    add_placement(parser.add_argument_group("placement"))
    requests = parser.add_argument_group("requests")
    add_limits(requests)
    add = requests.add_argument
    add(
        "--max-model-len", type=positive_int, metavar="TOKENS", help="longest prompt plus answer (default: the model's)"
    )
    add("--no-prefix-caching", action="store_true", help="compute every prompt in full; reuse no cached prefix")
    _add_memory(parser)
    _add_processes(parser)
    add_config(parser)
    add_examples(
        parser,
        ("kvbelt up", "a prefill worker, a decode worker and the proxy, with the demo model"),
        ("kvbelt up 2p2d --model /models/llama --device cuda", "four workers, on four GPUs"),
        ("kvbelt up 2p2d --print-config > up.yaml; kvbelt up --config up.yaml", "all options in one file"),
        ("kvbelt up 1p1d --engine vllm --vllm-python ~/vllm/bin/python --model /models/llama", "vLLM as the engine"),
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    add = group.add_argument
    add("--engine", choices=["embedded", "vllm"], default="embedded", help="the workers' engine")
    add("--vllm-python", type=Path, metavar="PATH", help="the Python of vLLM's environment (default: this one)")
    add(
        "--worker-arg", action="append", default=[], metavar="ARG",
        help="one more argument for every worker, e.g. --worker-arg=--enforce-eager; repeatable",
    )  # fmt: skip
    add_worker_key(group)


def _add_memory(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("KV and its transfer").add_argument
    add("--kv-gb", type=positive_number, metavar="GB", help="KV memory per worker (default: the worker decides)")
    add("--transfer-channel", choices=["nixl", "mooncake"], default="nixl", help="the library that transfers KV")
    add("--buffer-device", choices=["cpu", "cuda"], help="default: where the engine is")
    add("--buffer-gb", type=positive_number, default=1.0, metavar="GIB", help="staging memory on each side")
    add(
        "--allow-slow-gpus", action="store_true",
        help="start although UCX_TLS lacks cuda_ipc: KV between this host's GPUs then goes through the CPU",
    )  # fmt: skip


def _add_processes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("proxy and processes").add_argument
    add("--host", default="127.0.0.1", help="where the proxy listens")
    add("--port", type=port, help=f"the proxy's port (default: {PROXY_PORT})")
    add("--auto-ports", action="store_true", help="use free ports instead of the well-known ones")
    add(
        "--proxy-arg", action="append", default=[], metavar="ARG",
        help="one more argument for the proxy, e.g. --proxy-arg=--log-requests=0; repeatable",
    )  # fmt: skip
    add("--restart", action="store_true", help="restart a process that dies")
    add("--start-timeout", type=positive_number, default=600.0, metavar="SECONDS", help="time until all are ready")
    add(
        "--drain-seconds", type=positive_number, default=DRAIN_SECONDS, metavar="SECONDS",
        help="time for open requests at the end; a second Ctrl-C cuts them",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if args.print_config:
        print(as_config(args, args.parser), end="")
        return 0
    terminal = Terminal(show_logs=args.logs)
    started = time.monotonic()

    async def serve(deployment: Deployment, stop: asyncio.Event) -> int:
        for line in banner(
            url=deployment.url,
            model=args.model,
            topology=str(deployment.spec.topology),
            key=deployment.admin_key_file,
            logs=deployment.logs,
            drain_seconds=args.drain_seconds,
            seconds=time.monotonic() - started,
            width=terminal.width,
        ):
            terminal.say(line)
        if not sys.stdout.isatty():  # for programs; a person has read it
            with contextlib.suppress(OSError):  # serve even if the reader is gone
                print(f"ready {deployment.url}", flush=True)
        async with controlled(deployment, terminal, args.model, os.getpid()):
            await stop.wait()
        return 0

    try:
        spec = _checked(args, terminal)
        return asyncio.run(deploy(spec, terminal, serve, args.drain_seconds))
    except KeyboardInterrupt:  # a signal before the loop handles signals
        return 0
    except KVBeltError as error:
        return report(error)


def _checked(args: argparse.Namespace, terminal: Terminal) -> DeploymentSpec:
    """What to start. Checks all that can be checked at once, and only then makes a model that is missing.

    Raises:
        KVBeltError: it cannot start; nothing was made.
    """
    topology = Topology.parse(args.topology)
    if (problem := lopsided(topology.prefill, topology.decode)) is not None:
        terminal.error(problem)
    if not args.auto_ports:
        _require_ports(topology, args.host, args.port or PROXY_PORT)
    python, device, torch = args.vllm_python, args.device, None
    if python is None:
        require_engine(f"kvbelt up --engine {args.engine}", args.engine)
    elif args.engine != "vllm":
        raise SettingsError("--vllm-python is for --engine vllm; embedded workers run in kvbelt's own environment")
    else:
        python = python.expanduser().absolute()  # a link in a virtual environment must stay one
        torch = require_vllm_of(python)
        device = resolve_device(device, torch)
    require_device(device, torch)
    key = worker_key_of(args)
    if key is not None and args.engine != "vllm":
        raise SettingsError("--worker-api-key-file is for --engine vllm; embedded workers ask for no key")
    key_arguments = () if key is None else ("--worker-api-key-file", str(args.worker_api_key_file))
    spec = DeploymentSpec(
        topology=topology,
        model=Path(args.model),
        served_name=args.model,
        engine=args.engine,
        vllm_python=python,
        worker_args=(*args.worker_arg, *(limit_arguments(args) if args.engine == "embedded" else ())),
        dtype=args.dtype,
        device=device,
        host=args.host,
        port=args.port,
        auto_ports=args.auto_ports,
        threads=args.threads,
        kv_gb=args.kv_gb,
        transfer_channel=args.transfer_channel,
        buffer_device=args.buffer_device,
        buffer_gb=args.buffer_gb,
        max_model_len=args.max_model_len,
        prefix_caching=not args.no_prefix_caching,
        allow_slow_gpus=args.allow_slow_gpus,
        log_dir=args.log_dir,
        logs_shown=args.logs,
        restart=args.restart,
        start_timeout=args.start_timeout,
        proxy_args=(*placement_arguments(args), *key_arguments, *limit_arguments(args), *args.proxy_arg),
        worker_api_key=key,
    )
    return with_model(spec, args.model, terminal)


def with_model(spec: DeploymentSpec, name: str, terminal: Terminal) -> DeploymentSpec:
    """A deployment of the model that ``--model`` names, which is made only if the memory holds it.

    Raises:
        KVBeltError: there is no such model, or it cannot be served here.
        KeyboardInterrupt: a signal came.
    """
    own = own_weight_bytes(name, spec.dtype)
    warnings = [crowded(spec)]
    if own is not None:
        warnings.append(require_memory(spec, own))
    spec = replace(spec, model=prepare_model(name, terminal))
    require_model(spec.model, spec.engine)
    if own is None:
        warnings.append(require_memory(spec, weight_bytes(spec.model, spec.dtype)))
    for warning in filter(None, warnings):
        terminal.error(warning)
    return spec


def _require_ports(topology: Topology, host: str, proxy: int) -> None:
    try:
        check_free(list(seed_ports(topology, proxy=proxy).uses(host)))
    except StartError as error:
        if not (others := running_deployments()):
            raise
        other = others[0]
        raise StartError(
            f"{error}. A deployment runs already since {age(other)}: {other.topology} at {other.url}, started by "
            f"process {other.pid}; stop it with: kill {other.pid}"
        ) from None


def prepare_model(name: str, terminal: Terminal) -> Path:
    """The folder of ``--model``.

    Making a model on first use takes seconds; every signal then ends it as Ctrl-C does.

    Raises:
        KVBeltError: there is no such model.
        KeyboardInterrupt: a signal came.
    """
    before = {number: signal.signal(number, signal.default_int_handler) for number in _SIGNALS}
    try:
        return find_model(name, terminal.info)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report(error: KVBeltError) -> int:
    """Print why the start failed, and return the exit status."""
    print(f"kvbelt: {error}", file=sys.stderr)
    return 1 if isinstance(error, NotReadyError) else 2


async def deploy(
    spec: DeploymentSpec,
    terminal: Terminal,
    serve: Callable[[Deployment, asyncio.Event], Awaitable[int]],
    drain_seconds: float = DRAIN_SECONDS,
) -> int:
    """Start, ``serve`` until it returns or a signal comes, stop. Returns ``serve``'s status, or 0 after a signal.

    Open requests get ``drain_seconds`` to end. A second signal ends everything at once.

    Raises:
        StartError: as ``Deployment.start``; nothing is left running.
    """
    deployment = Deployment(spec, terminal)
    signals = Signals()
    started = asyncio.Event()

    async def start_and_serve() -> int:
        await deployment.start()
        started.set()
        return await serve(deployment, signals.first)

    with signals.handled():
        work = asyncio.create_task(start_and_serve(), name="deployment")
        signalled = asyncio.create_task(signals.first.wait(), name="signals")
        try:
            await asyncio.wait([work, signalled], return_when=asyncio.FIRST_COMPLETED)
            if signalled.done() and not work.done():
                # If it was serving, let it print its last lines.
                await asyncio.wait([work], timeout=FINISH_SECONDS)
            if work.done():
                return work.result()
            return 0
        finally:
            for task in (work, signalled):
                task.cancel()
            await asyncio.gather(work, signalled, return_exceptions=True)
            if started.is_set():
                proxy, key = deployment.process("proxy"), load_admin_key(deployment.admin_key_file)
                await drain(Address(proxy.host, proxy.port), key, drain_seconds, terminal, signals.second)
                terminal.info("stopping")
            await deployment.stop(grace=_AT_ONCE_SECONDS if signals.second.is_set() else GRACE_SECONDS)
