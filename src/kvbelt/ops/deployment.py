"""A whole deployment, as ``kvbelt up``, the demo, the benchmarks and the end-to-end tests start it.

async with Deployment(spec) as deployment:
... deployment.url ...

with running(spec) as deployment:      # the same from synchronous code
... deployment.url ...
"""

import asyncio
import concurrent.futures
import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from kvbelt.errors import StartError
from kvbelt.ops.child import GRACE_SECONDS
from kvbelt.ops.http_client import reachable
from kvbelt.ops.ports import PROXY_PORT, Ports, check_free, free_ports, seed_ports
from kvbelt.ops.processes import (
    DeploymentSpec,
    KeyFiles,
    admin_key_file,
    process_specs,
    require_fast_gpus,
    write_configs,
    write_keys,
)
from kvbelt.ops.supervisor import Supervisor
from kvbelt.ops.terminal import Terminal
from kvbelt.security.admin_key import write_admin_key

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunningProcess:
    name: str
    role: str  #: ``prefill``, ``decode``, ``both`` or ``proxy``
    pid: int
    host: str
    port: int
    running: bool

    @property
    def url(self) -> str:
        return _url(self.host, self.port)


class Deployment:
    """Starts all processes on entry and ends them on exit.

    Raises (on entry):
        StartError: a port is taken, the model folder does not exist, or a process died or was not ready in time.
    """

    def __init__(self, spec: DeploymentSpec, terminal: Terminal | None = None) -> None:
        self.spec = spec
        self._terminal = terminal if terminal is not None else Terminal()
        self._supervisor: Supervisor | None = None
        self._config_dir: Path | None = None
        self.ports: Ports | None = None
        self.keys: KeyFiles | None = None  #: while it runs
        self.logs: Path | None = None  #: the folder of the processes' logs

    @property
    def url(self) -> str:
        if self.ports is None:
            raise RuntimeError("not started")
        return _url(self.spec.host, self.ports.proxy)

    @property
    def admin_key_file(self) -> Path:
        """The admin key for ``kvbelt workers``, valid while the deployment runs."""
        return admin_key_file(self.folder)

    @property
    def folder(self) -> Path:
        """Of its keys and files, while it runs."""
        if self._config_dir is None:
            raise RuntimeError("not started")
        return self._config_dir

    @property
    def processes(self) -> list[RunningProcess]:
        """Every process, the proxy last; a restarted one has its new pid."""
        if self._supervisor is None:
            return []
        return [
            RunningProcess(name, child.spec.role, child.pid, child.spec.host, child.spec.port, child.running)
            for name, child in self._supervisor.children.items()
        ]

    @property
    def workers(self) -> list[RunningProcess]:
        """All processes but the proxy."""
        return [process for process in self.processes if process.role != "proxy"]

    def process(self, name: str) -> RunningProcess:
        """One process by name (``prefill-0``, ``proxy``).

        Raises:
            KeyError: there is none.
        """
        for process in self.processes:
            if process.name == name:
                return process
        raise KeyError(name)

    def log_tail(self, name: str) -> list[str]:
        """The last lines of a process's log."""
        return list(self._supervisor.children[name].tail) if self._supervisor is not None else []

    async def start(self) -> None:
        """Start every process and wait until a request would succeed. On failure nothing is left running."""
        spec = self.spec
        if not spec.model.is_dir():
            raise StartError(f"--model {spec.model} is not a folder; give a local Hugging Face model folder, or 'demo'")
        require_fast_gpus(spec, spec.env.get("UCX_TLS", os.environ.get("UCX_TLS")))
        if spec.auto_ports:
            self.ports = free_ports(spec.topology, proxy=spec.port)
        else:
            self.ports = seed_ports(spec.topology, proxy=spec.port if spec.port is not None else PROXY_PORT)
        check_free(list(self.ports.uses(spec.host, spec.notify_host, elsewhere=spec.places)))
        if spec.log_dir is not None:
            try:
                spec.log_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StartError(f"--log-dir {spec.log_dir} cannot be made: {error.strerror}; choose another") from None
        self._config_dir = Path(tempfile.mkdtemp(prefix="kvbelt-"))
        try:
            keys = self.keys = write_keys(spec, self._config_dir)
            admin_key = write_admin_key(admin_key_file(self._config_dir))
            configs = write_configs(spec, self.ports, self._config_dir, keys)
            processes = process_specs(spec, self.ports, configs, keys, admin_key)
            self.logs = spec.log_dir
            if self.logs is None and not spec.logs_shown:
                self.logs = self._config_dir / "logs"
                self.logs.mkdir()
            self._supervisor = Supervisor(processes, self._terminal, log_dir=self.logs, restart=spec.restart)
            self._supervisor.start()
            await self._supervisor.wait_ready(spec.start_timeout)
        except BaseException:
            await self.stop()
            raise

    async def restart(self, name: str, *, alone: bool = False) -> None:
        """Restart one process; returns when it is ready (``alone``: when it answers)."""
        if self._supervisor is None:
            raise RuntimeError("not started")
        await self._supervisor.restart(name, alone=alone, seconds=max(60.0, self.spec.start_timeout))

    async def stop(self, grace: float = GRACE_SECONDS) -> None:
        """End everything. Idempotent; leaves no process, port or file behind, except logs in ``log_dir``.

        ``grace``: seconds for processes to end by themselves.
        """
        if self._supervisor is not None:
            await self._supervisor.stop(grace)
        if self._config_dir is not None:
            shutil.rmtree(self._config_dir, ignore_errors=True)
            self._config_dir = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()


class SyncDeployment:
    """A deployment for synchronous code, made by ``running``."""

    def __init__(self, deployment: Deployment, loop: asyncio.AbstractEventLoop) -> None:
        self._deployment = deployment
        self._loop = loop

    @property
    def url(self) -> str:
        return self._deployment.url

    @property
    def ports(self) -> Ports:
        if self._deployment.ports is None:
            raise RuntimeError("not started")
        return self._deployment.ports

    @property
    def admin_key_file(self) -> Path:
        return self._deployment.admin_key_file

    @property
    def processes(self) -> list[RunningProcess]:
        return self._call(_just(lambda: self._deployment.processes))

    @property
    def workers(self) -> list[RunningProcess]:
        return self._call(_just(lambda: self._deployment.workers))

    def process(self, name: str) -> RunningProcess:
        return self._call(_just(lambda: self._deployment.process(name)))

    def log_tail(self, name: str) -> list[str]:
        return self._call(_just(lambda: self._deployment.log_tail(name)))

    def restart(self, name: str) -> None:
        self._call(self._deployment.restart(name))

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _just(read: Callable[[], T]) -> T:
    # Children belong to the loop's thread and are read there.
    return read()


@contextlib.contextmanager
def running(spec: DeploymentSpec, terminal: Terminal | None = None) -> Iterator[SyncDeployment]:
    """Run a deployment on a thread of its own.

    Raises:
        StartError: as ``Deployment``.
    """
    started: concurrent.futures.Future[SyncDeployment] = concurrent.futures.Future()
    finished: list[asyncio.Event] = []

    async def serve() -> None:
        finished.append(asyncio.Event())
        async with Deployment(spec, terminal) as deployment:
            started.set_result(SyncDeployment(deployment, asyncio.get_running_loop()))
            await finished[0].wait()

    def thread() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:  # noqa: BLE001 -- raised again in the caller's thread
            if not started.done():
                started.set_exception(error)

    # The kernel kills the children with the thread that started them, so the thread lives as long as they do.
    runner = threading.Thread(target=thread, name="kvbelt deployment", daemon=True)
    runner.start()
    deployment = started.result()
    try:
        yield deployment
    finally:
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            deployment._loop.call_soon_threadsafe(finished[0].set)  # noqa: SLF001 -- the two halves of one thing
        runner.join()


def _url(host: str, port: int) -> str:
    name = reachable(host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
