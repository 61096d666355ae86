"""Seven faults, done to a running 2p2d under load and undone again. What should notice them is the caller's business.

    with patient(folder) as p, p.traffic():
        with BY_NAME["dead-worker"].hurts(p):
            ...

Each fault brings the load that it shows under, if ordinary traffic is not enough. The model is the tiny one.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from kvbelt.ops.deployment import RunningProcess, SyncDeployment, running
from kvbelt.ops.network import Network
from kvbelt.ops.processes import SPLIT_ALL, DeploymentSpec
from kvbelt.ops.terminal import Terminal
from kvbelt.ops.tiny_model import tiny_model_dir
from kvbelt.ops.topology import Topology
from tests.e2e.altered import VARIABLE

#: KV of the tiny model, a token.
_TOKEN_BYTES = 2048

_WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


@dataclass
class Patient:
    """A 2p2d for faults."""

    deployment: SyncDeployment
    folder: Path
    network: Network | None
    _altered: dict[str, Any] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def worker(self, name: str) -> RunningProcess:
        """One of its workers."""
        return self.deployment.process(name)

    @contextlib.contextmanager
    def traffic(self, *, at_once: int = 4, prompt: int = 600, answer: int = 6) -> Iterator[None]:
        """Clients that ask without pause, each time for something new; tokens of prompts and answers."""
        stop = threading.Event()
        with ThreadPoolExecutor(at_once) as pool:
            for _ in range(at_once):
                pool.submit(self._ask_on, stop, prompt, answer)
            try:
                yield
            finally:
                stop.set()

    def _ask_on(self, stop: threading.Event, prompt: int, answer: int) -> None:
        with httpx.Client(timeout=30) as client:
            while not stop.is_set():
                number = next(self._numbers)
                text = "".join(f"{number + n} monkeys sat on {number * 7 + n} walls. " for n in range(prompt // 20))
                body = {
                    "prompt": text[:prompt],  # a token a character
                    "max_tokens": answer,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": True,
                    "cache_salt": str(number),
                }
                try:
                    client.post(self.deployment.url + "/v1/completions", json=body)
                except httpx.HTTPError:
                    stop.wait(0.2)

    @contextlib.contextmanager
    def altered(self, *names: str, alteration: Callable[[str], dict[str, Any]]) -> Iterator[None]:
        """Restart these workers with altered.py while the body runs, and restart them again at its end."""
        ports = {name: str(self.worker(name).port) for name in names}
        self._altered |= {port: alteration(name) for name, port in ports.items()}
        self._start_again(names)
        try:
            yield
        finally:
            for port in ports.values():
                del self._altered[port]
            self._start_again(names)

    def _start_again(self, names: tuple[str, ...]) -> None:
        (self.folder / "alterations.json").write_text(json.dumps(self._altered), encoding="utf-8")
        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(self.deployment.restart, names))

    def option(self, name: str, option: str) -> str:
        """The value of an option on a worker's command line."""
        command = Path(f"/proc/{self.worker(name).pid}/cmdline").read_text(encoding="utf-8").split("\0")
        return command[command.index(option) + 1]


@contextlib.contextmanager
def patient(folder: Path, *, with_network: bool = False) -> Iterator[Patient]:
    """Start one.

    Raises:
        NetworkRefusedError: ``with_network``, and this machine does not let us make hosts.
    """
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network(list(_WORKERS))) if with_network else None
        places = {} if network is None else {"places": network.places, "notify_host": network.gateway}
        spec = DeploymentSpec(
            topology=Topology(2, 2),
            model=tiny_model_dir(_say),
            auto_ports=True,
            threads=1,
            kv_gb=0.1,
            buffer_gb=0.05,
            max_model_len=2048,
            device="cpu",
            worker_args=("--max-batch-tokens", "128", "--max-running", "8"),
            command=(sys.executable, str(Path(__file__).with_name("altered.py"))),
            env={VARIABLE: str(folder / "alterations.json")},
            proxy_args=SPLIT_ALL,
            **places,  # type: ignore[arg-type]
        )
        yield Patient(stack.enter_context(running(spec, Terminal(show_logs=False))), folder, network)


@contextlib.contextmanager
def _slow_link(hurt: Patient) -> Iterator[None]:
    """One decode worker's cable lets 2 Mbit/s through."""
    assert hurt.network is not None
    hurt.network.slow("decode-1", kbit=2000)
    try:
        yield
    finally:
        hurt.network.fast("decode-1")


@contextlib.contextmanager
def _tcp_only(hurt: Patient) -> Iterator[None]:
    """UCX_TLS=tcp for all workers of one host."""
    with hurt.altered(*_WORKERS, alteration=lambda _: {"env": {"UCX_TLS": "tcp"}}):
        yield


@contextlib.contextmanager
def _full_buffer(hurt: Patient) -> Iterator[None]:
    """Receive buffers of one prompt and a half, under more requests than decode workers run at once."""

    def smaller(name: str) -> dict[str, Any]:
        file = Path(hurt.option(name, "--config"))
        config = yaml.safe_load(file.read_text(encoding="utf-8")) | {"pd_buffer_size": 900 * _TOKEN_BYTES}
        changed = hurt.folder / f"{name}-small.yaml"
        changed.write_text(yaml.safe_dump(config), encoding="utf-8")
        return {"options": {"--config": str(changed)}}

    with (
        hurt.altered("decode-0", "decode-1", alteration=smaller),
        hurt.traffic(at_once=24, prompt=600, answer=150),
    ):
        yield


@contextlib.contextmanager
def _overloaded_prefill(hurt: Patient) -> Iterator[None]:
    """Forty clients with long prompts and answers of one token."""
    with hurt.traffic(at_once=40, prompt=1900, answer=1):
        yield


@contextlib.contextmanager
def _overloaded_decode(hurt: Patient) -> Iterator[None]:
    """Forty clients with short prompts and long answers."""
    with hurt.traffic(at_once=40, prompt=40, answer=600):
        yield


@contextlib.contextmanager
def _mixed_models(hurt: Patient) -> Iterator[None]:
    """One prefill worker has other weights under the same name."""

    def another(name: str) -> dict[str, Any]:
        model = Path(hurt.option(name, "--model"))
        other = hurt.folder / "other" / model.name
        shutil.copytree(model, other, dirs_exist_ok=True)
        weights = next(other.glob("*.safetensors"))
        raw = bytearray(weights.read_bytes())
        raw[-20_000:] = bytes(20_000)
        weights.write_bytes(raw)
        return {"options": {"--model": str(other)}}

    with hurt.altered("prefill-1", alteration=another):
        yield


@contextlib.contextmanager
def _dead_worker(hurt: Patient) -> Iterator[None]:
    """One decode worker is killed."""
    os.kill(hurt.worker("decode-1").pid, signal.SIGKILL)
    try:
        yield
    finally:
        hurt.deployment.restart("decode-1")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault."""

    name: str
    hurts: Callable[[Patient], AbstractContextManager[None]]
    alert: str  #: of deploy/prometheus/alerts.yml: must fire
    needs_network: bool = False

    @property
    def what(self) -> str:
        """The fault in words."""
        return (self.hurts.__doc__ or "").rstrip(".")


FAULTS = (
    Fault("slow-link", _slow_link, "KVBeltTransferSlow", needs_network=True),
    Fault("tcp-only", _tcp_only, "KVBeltTCPFallback"),
    Fault("full-buffer", _full_buffer, "KVBeltBufferFull"),
    Fault("overloaded-prefill", _overloaded_prefill, "PrefillerOverload"),
    Fault("overloaded-decode", _overloaded_decode, "KVBeltDecodeOverload"),
    Fault("mixed-models", _mixed_models, "KVBeltPairsRefused"),
    Fault("dead-worker", _dead_worker, "KVBeltWorkerLost"),
)

BY_NAME = {fault.name: fault for fault in FAULTS}
