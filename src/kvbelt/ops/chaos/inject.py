"""Doing faults and undoing them. What is done is undone by the task that did it, also when that is cancelled.

A process that is being started again, or is stopped, is left alone by other faults of its process, and a host that is
cut off or slow by others of its network. Otherwise kinds overlap freely: a stopped worker may be cut off as well.
"""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from kvbelt.errors import StartError
from kvbelt.ops.chaos.faults import Kind, Need, Whom
from kvbelt.ops.chaos.load import Load
from kvbelt.ops.chaos.recovery import Injected, Skipped
from kvbelt.ops.chaos.rubbish_io import Thrower
from kvbelt.ops.chaos.schedule import Injection, pick
from kvbelt.ops.chaos.site import Site
from kvbelt.ops.deployment import Deployment
from kvbelt.ops.network import Network

#: Long prompts of one burst. The command gives receive buffers that hold fewer.
BURST = 8

#: Of slow links, in kbit/s, and with the kernel's netem in ms.
_KBITS = (500, 2000, 8000)
_DELAYS_MS = (0, 5, 25)

Outcome = Injected | Skipped


class Injector:
    """Does the faults of one run.

    Attributes:
        away: spans in which the proxy was not there; the last may be open.
        not_back: workers that were started again and did not become ready, and why.
        restarting: processes that are being started again now.
    """

    def __init__(
        self,
        site: Site,
        load: Load,
        *,
        deployment: Deployment | None = None,
        network: Network | None = None,
        thrower: Thrower | None = None,
    ) -> None:
        self._site = site
        self._load = load
        self._deployment = deployment
        self._network = network
        self._thrower = thrower or Thrower(None)
        self._stopped: set[str] = set()
        self._cabled: set[str] = set()  # hosts whose cable somebody has in his hands
        self.restarting: set[str] = set()
        self.away: list[tuple[float, float]] = []
        self.not_back: dict[str, str] = {}
        self._ways: dict[str, Callable[[Injection], Awaitable[Outcome]]] = {
            "kill": self._kill,
            "stop": self._stop,
            "cut": self._cut,
            "slow": self._slow,
            "full": self._fill,
            "rubbish": self._throw,
            "clients": self._hang_up,
            "restart": self._restart_proxy,
        }

    def why_not(self, kind: Kind) -> str | None:
        """Why a kind cannot be done here at all; None: it can."""
        if kind.needs is Need.PROCESSES and self._deployment is None:
            return "the processes are not this command's"
        if kind.needs is Need.NETWORK and self._network is None:
            return "the workers have no hosts of their own"
        if kind.whom in (Whom.PREFILL, Whom.DECODE) and not self._site.of_role(kind.whom):
            return f"there is no {kind.whom} worker"
        return None

    def was_away(self, begin: float, end: float) -> bool:
        """Whether the proxy was being started again at some moment between."""
        return any(gone <= end and begin <= back for gone, back in self.away)

    async def inject(self, injection: Injection) -> Outcome:
        """Do it, wait, undo it."""
        if (why := self.why_not(injection.kind)) is not None:
            return Skipped(injection, why)
        return await self._ways[injection.kind.name.partition("-")[0]](injection)

    # Processes

    async def _kill(self, injection: Injection) -> Outcome:
        name = self._target(injection, self.restarting)
        if name is None:
            return Skipped(injection, "every worker of this role is being started again")
        began = time.monotonic()
        self._signal(name, self._deployed.process(name).pid, signal.SIGKILL)
        await self.restart(name)
        return self._done(injection, name, began)

    async def _stop(self, injection: Injection) -> Outcome:
        name = self._target(injection, self.restarting | self._stopped)
        if name is None:
            return Skipped(injection, "every worker of this role is stopped or being started again")
        began = time.monotonic()
        async with self.stopped(name):
            await asyncio.sleep(injection.seconds)
        return self._done(injection, name, began)

    @contextlib.asynccontextmanager
    async def stopped(self, name: str) -> AsyncIterator[None]:
        """A process is stopped (SIGSTOP) while the body runs."""
        pid = self._deployed.process(name).pid
        self._stopped.add(name)
        self._signal(name, pid, signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(name, pid, signal.SIGCONT)
            self._stopped.discard(name)

    async def _restart_proxy(self, injection: Injection) -> Outcome:
        if "proxy" in self.restarting:
            return Skipped(injection, "the proxy is being started again")
        began = time.monotonic()
        self.away.append((began, float("inf")))
        try:
            await self.restart("proxy")
        finally:
            self.away[-1] = (began, time.monotonic())
        return self._done(injection, None, began)

    async def restart(self, name: str) -> None:
        """Start a process again; ``not_back`` tells if it did not become ready."""
        self.restarting.add(name)
        try:
            await self._deployed.restart(name, alone=name == "proxy")  # it serves with the workers that it has
            self.not_back.pop(name, None)
        except StartError as error:
            self.not_back[name] = str(error)
        finally:
            self.restarting.discard(name)

    def _signal(self, name: str, pid: int, number: signal.Signals) -> None:
        process = self._deployed.process(name)
        if process.pid == pid and process.running:  # or else the number may be somebody else's by now
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    @property
    def _deployed(self) -> Deployment:
        assert self._deployment is not None
        return self._deployment

    # The network

    async def _cut(self, injection: Injection) -> Outcome:
        network = self._network
        assert network is not None
        return await self._with_cable(injection, network.cut, network.mend)

    async def _slow(self, injection: Injection) -> Outcome:
        network = self._network
        assert network is not None
        chance = random.Random(injection.seed)
        kbit, delay_ms = chance.choice(_KBITS), chance.choice(_DELAYS_MS)

        def slow(name: str) -> None:
            network.slow(name, kbit=kbit, delay_ms=delay_ms)

        return await self._with_cable(injection, slow, network.fast, f"{kbit} kbit/s")

    async def _with_cable(
        self, injection: Injection, do: Callable[[str], None], undo: Callable[[str], None], detail: str = ""
    ) -> Outcome:
        name = self._target(injection, self._cabled)
        if name is None:
            return Skipped(injection, "every host of this role is cut off or slow")
        began = time.monotonic()
        self._cabled.add(name)
        try:
            await asyncio.to_thread(do, name)
            await asyncio.sleep(injection.seconds)
        finally:
            await asyncio.shield(asyncio.to_thread(undo, name))
            self._cabled.discard(name)
        return self._done(injection, name, began, detail)

    # Clients

    async def _fill(self, injection: Injection) -> Outcome:
        began = time.monotonic()
        await self._load.burst(BURST)
        return self._done(injection, None, began)

    async def _hang_up(self, injection: Injection) -> Outcome:
        began = time.monotonic()
        await self._load.leaving(injection.seconds)
        return self._done(injection, None, began)

    async def _throw(self, injection: Injection) -> Outcome:
        port = injection.kind.name.removeprefix("rubbish-")
        name = self._target(injection, self.restarting | self._stopped)
        if name is None:
            return Skipped(injection, "nobody is there to throw at")
        began = time.monotonic()
        thrown = await self._thrower.throw(self._site, name, port, injection.seconds, random.Random(injection.seed))
        if not thrown:
            return Skipped(injection, f"{name} did not say where its ports are")
        detail = ", ".join(f"{count} {form}" for form, count in thrown.most_common())
        return self._done(injection, name, began, f"{name}: {detail}")

    # Whom, and when

    def _target(self, injection: Injection, barred: set[str]) -> str | None:
        whom = injection.kind.whom
        if whom is Whom.PROXY:
            return None if "proxy" in barred else "proxy"
        return pick(injection.choice, [name for name in self._site.of_role(whom) if name not in barred])

    def _done(self, injection: Injection, name: str | None, began: float, detail: str = "") -> Injected:
        address = str(self._site.workers[name]) if name is not None and name != "proxy" else None
        return Injected(injection, name, address, began, time.monotonic(), detail)
