"""The proxies that ``benchmarks.proxy`` compares, each started on core 0 in front of the same two stand-in engines."""

import asyncio
import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks._proxy_load import request

SECONDS_TO_START = 20.0

#: The ports of a prefill and of a decode engine.
Engines = tuple[int, int]

_HERE = Path(__file__).parent
_KVBELT = (
    "-m kvbelt proxy --port {port} --notify-port {second_port} --prefill-host 127.0.0.1 --prefill-port {prefill} "
    "--decode-host 127.0.0.1 --decode-port {decode}"
)
# Its default policy asks both workers to tokenize the prompt first, which makes it slower.
_VLLM_ROUTER = (
    "-m vllm_router.launch_router --port {port} --prometheus-port {second_port} --policy round_robin "
    "--log-level warning"
)


@dataclass(frozen=True, slots=True)
class System:
    """A proxy, and the arguments with which Python starts it."""

    name: str
    arguments: str
    package: str = ""  #: the import name of a package that must be installed
    source: Path | None = None  #: of kvbelt, if it is another than this one
    ids: bool = False  #: the engines return token ids though it does not ask for them


def kvbelt(name: str, arguments: str = "", source: Path | None = None) -> System:
    """``kvbelt proxy`` with further arguments."""
    return System(name, f"{_KVBELT} {arguments}", source=source)


def script(name: str, file: str) -> System:
    """A script beside this one, which takes three ports: its own, the prefill engine's, the decode engine's."""
    return System(name, f"{shlex.quote(str(_HERE / file))} {{port}} {{prefill}} {{decode}}")


_VLLM_ROUTER_PD = (
    f"{_VLLM_ROUTER} --vllm-pd-disaggregation --prefill http://127.0.0.1:{{prefill}} "
    "--decode http://127.0.0.1:{decode}"
)

RIVALS = (
    System("vllm-router", _VLLM_ROUTER_PD, "vllm_router"),
    # As much to read as kvbelt has, which asks for the ids.
    System("vllm-router, sent ids", _VLLM_ROUTER_PD, "vllm_router", ids=True),
    System(
        "vllm-router, whole",
        f"{_VLLM_ROUTER} --worker-urls http://127.0.0.1:{{prefill}} http://127.0.0.1:{{decode}}",
        "vllm_router",
    ),
    script("aiohttp", "_proxy_aiohttp.py"),
)


class NotStartedError(Exception):
    """A proxy cannot be measured; the message says why."""


@dataclass(frozen=True, slots=True)
class Running:
    """A proxy that answers requests."""

    system: System
    port: int
    process: subprocess.Popen[bytes]


def free_port() -> int:
    """A port that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pin(core: int) -> None:
    """Bind this process to one core, if the system allows it."""
    if hasattr(os, "sched_setaffinity") and core in os.sched_getaffinity(0):
        os.sched_setaffinity(0, {core})


async def start(system: System, engines: Engines) -> Running:
    """Start a proxy in front of the engines at these ports, and wait until it answers.

    Raises:
        NotStartedError: its package is not installed, it has ended, or it does not answer.
    """
    if system.package and importlib.util.find_spec(system.package) is None:
        raise NotStartedError(f"{system.name} is left out: it is not installed; pip install -e '.[bench]' installs it")
    port = free_port()
    with tempfile.TemporaryFile() as log:
        process = _spawn(system, engines, port, log)
        try:
            async with asyncio.timeout(SECONDS_TO_START):
                while process.poll() is None:
                    if await _answers(port):
                        return Running(system, port, process)
                    await asyncio.sleep(0.05)
            problem = f"ended with status {process.returncode}"
        except TimeoutError:
            problem = f"does not answer within {SECONDS_TO_START:g} s"
        except BaseException:
            stop([process])
            raise
        stop([process])
        raise NotStartedError(f"{system.name} is left out: it {problem}: {_last_line(log)}")


def _spawn(system: System, engines: Engines, port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    prefill, decode = engines
    told = system.arguments.format(port=port, second_port=free_port(), prefill=prefill, decode=decode)
    env = dict(os.environ) if system.source is None else {**os.environ, "PYTHONPATH": str(system.source)}
    arguments = [sys.executable, *shlex.split(told)]
    # This process has no threads.
    return subprocess.Popen(arguments, env=env, stdout=log, stderr=log, preexec_fn=lambda: pin(0))  # noqa: PLW1509


async def _answers(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request("x").replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1))
        answer = await reader.read()
        writer.close()
    except OSError:
        return False
    return answer.startswith(b"HTTP/1.1 200")


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it wrote nothing")


def stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End proxies: first with SIGTERM, then with SIGKILL."""
    asked = list(processes)
    for process in asked:
        process.send_signal(signal.SIGTERM)
    for process in asked:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
