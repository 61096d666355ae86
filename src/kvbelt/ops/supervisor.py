"""Starts, watches and ends child processes together.

- If a child dies before all are ready, ``wait_ready`` raises with its name and the end of its log.
- A later death is logged in the same way. The others go on serving, and the child is restarted only with ``restart``.
- ``stop`` ends all at once, so that their grace periods overlap.

Nothing polls once all are ready.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvbelt.errors import StartError
from kvbelt.ops.child import GRACE_SECONDS, Child, describe_end
from kvbelt.ops.http_client import Address, Reply, UnreadableReplyError, get
from kvbelt.ops.losses import meaning
from kvbelt.ops.processes import ProcessSpec
from kvbelt.ops.start_board import StartBoard
from kvbelt.ops.terminal import Terminal
from kvbelt.wire.health import PROXY_HEALTH, WORKER_HEALTH

_POLL_SECONDS = 0.1
_HEALTH_SECONDS = 2.0

#: Pause before a restart; doubled with each death within ``_STEADY_SECONDS`` of a start.
_RESTART_SECONDS = 1.0
_MAX_RESTART_SECONDS = 30.0
_STEADY_SECONDS = 60.0


class NotReadyError(StartError):
    """All processes were started, but not all became ready."""


class ChildDiedError(NotReadyError):
    """A process died. The message has its name and the end of its log."""


class Supervisor:
    """Supervises processes. One event loop, one thread.

    Attributes:
        children: the latest process of each name.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        terminal: Terminal,
        *,
        log_dir: Path | None = None,
        restart: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._specs = list(specs)
        self._terminal = terminal
        self._log_dir = log_dir
        self._restart = restart
        self._clock = clock
        self.children: dict[str, Child] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._ready = False
        self._death: asyncio.Future[ChildDiedError] | None = None  # the first one before all were ready
        terminal.register([spec.name for spec in specs])

    def start(self) -> None:
        """Start every process; call ``wait_ready`` next.

        Raises:
            StartError: a program cannot be run. Call ``stop`` then, too.
        """
        self._death = asyncio.get_running_loop().create_future()
        for spec in self._specs:
            self._start_one(spec)

    async def wait_ready(self, timeout_seconds: float) -> None:
        """Wait until every process is ready, and show the progress.

        Raises:
            ChildDiedError: one died.
            NotReadyError: ``timeout_seconds`` passed.
        """
        if self._death is None:
            raise RuntimeError("start() comes first")
        polling = asyncio.create_task(self._poll_until_ready(timeout_seconds), name="wait for readiness")
        try:
            either: set[asyncio.Future[Any]] = {polling, self._death}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._death.done():
                raise self._death.result()
            polling.result()
        finally:
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)
        self._ready = True
        self._terminal.serving = True

    async def restart(self, name: str, *, alone: bool = False, seconds: float = 60.0) -> None:
        """End one process if it still runs, start it again, and wait until it is ready.

        A proxy is ready when all of its workers are; ``alone``: when it answers at all.

        Raises:
            ChildDiedError: it died again.
            KeyError: there is no such process.
            NotReadyError: it was not ready within ``seconds``.
        """
        child = self.children[name]
        await self._stop_watching(name)
        await child.stop()
        self._start_one(child.spec)
        again = self.children[name]
        deadline = self._clock() + seconds
        while not await self._is_ready(child.spec, alone=alone):
            if not again.running:
                raise _death(again)
            if self._clock() > deadline:
                raise NotReadyError(f"{name} was not ready again after {seconds:g} s")
            await asyncio.sleep(_POLL_SECONDS)

    async def stop(self, grace: float = GRACE_SECONDS) -> None:
        """End everything. Idempotent; no child is left when it returns."""
        for name in list(self._watchers):
            await self._stop_watching(name)
        await asyncio.gather(*(child.stop(grace) for child in self.children.values()))

    def _start_one(self, spec: ProcessSpec) -> None:
        child = Child(spec, self._terminal.log, log_dir=self._log_dir)
        self.children[spec.name] = child
        self._watchers[spec.name] = asyncio.create_task(self._watch(child), name=f"watch {spec.name}")

    async def _stop_watching(self, name: str) -> None:
        if (watcher := self._watchers.pop(name, None)) is not None:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher

    async def _watch(self, child: Child) -> None:
        pause = _RESTART_SECONDS
        while True:
            started = self._clock()
            await child.wait()
            death = _death(child)
            if not self._ready:
                if self._death is not None and not self._death.done():
                    self._death.set_result(death)
                return
            self._terminal.error(str(death))
            if not self._restart:
                self._terminal.error(self._meaning(child.spec))
                self._terminal.error(f"bring it back: kvbelt workers restart {child.spec.name}")
                return
            pause = _RESTART_SECONDS if self._clock() - started > _STEADY_SECONDS else pause
            self._terminal.info(f"starting {child.spec.name} again in {pause:.0f} s")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MAX_RESTART_SECONDS)
            child = Child(child.spec, self._terminal.log, log_dir=self._log_dir)
            self.children[child.spec.name] = child

    def _meaning(self, lost: ProcessSpec) -> str:
        alike = [child for child in self.children.values() if child.spec.role == lost.role]
        return meaning(lost.name, lost.role, [child.spec.name for child in alike if child.running])

    async def _poll_until_ready(self, timeout_seconds: float) -> None:
        started = self._clock()
        names = [spec.name for spec in self._specs]
        board = StartBoard(names, self._terminal)
        try:
            while True:
                states = await asyncio.gather(*map(self._state, self._specs))
                elapsed = self._clock() - started
                board.show(states, elapsed)
                if all(state == "ready" for state in states):
                    return
                if elapsed > timeout_seconds:
                    said = ", ".join(f"{name} {state}" for name, state in zip(names, states, strict=True))
                    raise NotReadyError(f"not ready after {timeout_seconds:g} s: {said}; --start-timeout waits longer")
                await asyncio.sleep(_POLL_SECONDS)
        finally:
            board.close()

    async def _state(self, spec: ProcessSpec) -> str:
        if spec.health_path is None:
            return "ready"
        health = await get(Address(spec.host, spec.port), spec.health_path, _HEALTH_SECONDS)
        return "starting" if health is None else readiness(spec.role, health)

    async def _is_ready(self, spec: ProcessSpec, *, alone: bool) -> bool:
        state = await self._state(spec)
        return state == "ready" or (alone and state != "starting")


def readiness(role: str, health: Reply) -> str:
    """``ready``, the process's own state, ``waiting``, or why its ``/health`` cannot be read.

    A proxy reports ready as soon as one of its workers is; the launcher waits for all of them.
    """
    try:
        if role == "proxy":
            proxy = health.read(PROXY_HEALTH, "the proxy")
            states = [proxy.state, *(worker.state for worker in proxy.workers)]
            for worker in proxy.workers:
                if worker.state == "unready" and worker.detail:
                    return f"waiting: {worker.worker}: {worker.detail}"
        elif health.body:
            states = [health.read(WORKER_HEALTH, "the worker").state]
        else:  # a vLLM server
            states = []
    except UnreadableReplyError as error:
        return str(error)
    if health.status == 200 and all(state == "ready" for state in states):
        return "ready"
    return states[0] if states and states[0] != "ready" else "waiting"


def _death(child: Child) -> ChildDiedError:
    end = describe_end(child.returncode if child.returncode is not None else 0)
    head = f"{child.spec.name} (pid {child.pid}) died: {end}"
    if not child.tail:
        return ChildDiedError(f"{head}; it wrote nothing")
    return ChildDiedError("\n".join([f"{head}; the end of its log:", *(f"    {line}" for line in child.tail)]))
