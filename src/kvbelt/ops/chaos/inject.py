"""Does faults and undoes them. The task that did a fault undoes it, also when it is cancelled.

A process that is stopped or restarting gets no second process fault, and a host that is cut off or slow no second
network fault. Other combinations overlap: a stopped worker may be cut off as well.
"""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from kvbelt.errors import StartError
from kvbelt.ops.chaos.endpoints import Endpoints
from kvbelt.ops.chaos.faults import FaultKind, Requirement, TargetRole
from kvbelt.ops.chaos.load import LoadGenerator
from kvbelt.ops.chaos.recovery import Injected, Skipped
from kvbelt.ops.chaos.rubbish_sender import RubbishSender
from kvbelt.ops.chaos.schedule import Injection, pick
from kvbelt.ops.deployment import Deployment
from kvbelt.ops.network import Network

#: Long prompts of one burst; the receive buffers hold fewer.
BURST = 8

#: Slow links: rates in kbit/s, and delays in ms where the kernel has netem.
_KBITS = (500, 2000, 8000)
_DELAYS_MS = (0, 5, 25)

InjectionOutcome = Injected | Skipped


class Injector:
    """Does the faults of one run.

    Attributes:
        away: spans in which the proxy was restarting; the last may be open.
        not_back: restarted workers that did not become ready, and why.
        restarting: processes that are being restarted now.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        load: LoadGenerator,
        *,
        deployment: Deployment | None = None,
        network: Network | None = None,
        rubbish: RubbishSender | None = None,
    ) -> None:
        self._endpoints = endpoints
        self._load = load
        self._deployment = deployment
        self._network = network
        self._rubbish = rubbish or RubbishSender(None)
        self._stopped: set[str] = set()
        self._network_busy: set[str] = set()  # hosts with a network fault
        self.restarting: set[str] = set()
        self.away: list[tuple[float, float]] = []
        self.not_back: dict[str, str] = {}
        self._actions: dict[str, Callable[[Injection], Awaitable[InjectionOutcome]]] = {
            "kill": self._kill,
            "stop": self._stop,
            "cut": self._cut,
            "slow": self._slow,
            "full": self._fill,
            "rubbish": self._send_rubbish,
            "clients": self._hang_up,
            "restart": self._restart_proxy,
        }

    def why_not(self, kind: FaultKind) -> str | None:
        """Why a kind of fault is impossible here; None if it is possible."""
        if kind.needs is Requirement.PROCESSES and self._deployment is None:
            return "the processes were not started by this command"
        if kind.needs is Requirement.NETWORK and self._network is None:
            return "the workers have no network namespaces"
        if kind.target_role in (TargetRole.PREFILL, TargetRole.DECODE) and not self._endpoints.of_role(
            kind.target_role
        ):
            return f"there is no {kind.target_role} worker"
        return None

    def was_away(self, begin: float, end: float) -> bool:
        """Whether the proxy was restarting at some moment of a span."""
        return any(gone <= end and begin <= back for gone, back in self.away)

    async def inject(self, injection: Injection) -> InjectionOutcome:
        """Do a fault, wait, and undo it."""
        if (why := self.why_not(injection.kind)) is not None:
            return Skipped(injection, why)
        return await self._actions[injection.kind.name.partition("-")[0]](injection)

    # Processes

    async def _kill(self, injection: Injection) -> InjectionOutcome:
        name = self._target(injection, self.restarting)
        if name is None:
            return Skipped(injection, "every worker of this role is restarting")
        began = time.monotonic()
        self._signal(name, self._deployed.process(name).pid, signal.SIGKILL)
        await self.restart(name)
        return self._done(injection, name, began)

    async def _stop(self, injection: Injection) -> InjectionOutcome:
        name = self._target(injection, self.restarting | self._stopped)
        if name is None:
            return Skipped(injection, "every worker of this role is stopped or restarting")
        began = time.monotonic()
        async with self.stopped(name):
            await asyncio.sleep(injection.seconds)
        return self._done(injection, name, began)

    @contextlib.asynccontextmanager
    async def stopped(self, name: str) -> AsyncIterator[None]:
        """Stop a process (SIGSTOP) while the body runs."""
        pid = self._deployed.process(name).pid
        self._stopped.add(name)
        self._signal(name, pid, signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(name, pid, signal.SIGCONT)
            self._stopped.discard(name)

    async def _restart_proxy(self, injection: Injection) -> InjectionOutcome:
        if "proxy" in self.restarting:
            return Skipped(injection, "the proxy is restarting")
        began = time.monotonic()
        self.away.append((began, float("inf")))
        try:
            await self.restart("proxy")
        finally:
            self.away[-1] = (began, time.monotonic())
        return self._done(injection, None, began)

    async def restart(self, name: str) -> None:
        """Restart a process; if it does not become ready, ``not_back`` has the reason."""
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
        if process.pid == pid and process.running:  # else the pid may belong to another process by now
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    @property
    def _deployed(self) -> Deployment:
        assert self._deployment is not None
        return self._deployment

    # The network

    async def _cut(self, injection: Injection) -> InjectionOutcome:
        network = self._network
        assert network is not None
        return await self._network_fault(injection, network.cut, network.mend)

    async def _slow(self, injection: Injection) -> InjectionOutcome:
        network = self._network
        assert network is not None
        chance = random.Random(injection.seed)
        kbit, delay_ms = chance.choice(_KBITS), chance.choice(_DELAYS_MS)

        def slow(name: str) -> None:
            network.slow(name, kbit=kbit, delay_ms=delay_ms)

        return await self._network_fault(injection, slow, network.fast, f"{kbit} kbit/s")

    async def _network_fault(
        self, injection: Injection, do: Callable[[str], None], undo: Callable[[str], None], detail: str = ""
    ) -> InjectionOutcome:
        name = self._target(injection, self._network_busy)
        if name is None:
            return Skipped(injection, "every host of this role is cut off or slow")
        began = time.monotonic()
        self._network_busy.add(name)
        try:
            await asyncio.to_thread(do, name)
            await asyncio.sleep(injection.seconds)
        finally:
            await asyncio.shield(asyncio.to_thread(undo, name))
            self._network_busy.discard(name)
        return self._done(injection, name, began, detail)

    # Clients

    async def _fill(self, injection: Injection) -> InjectionOutcome:
        began = time.monotonic()
        await self._load.burst(BURST)
        return self._done(injection, None, began)

    async def _hang_up(self, injection: Injection) -> InjectionOutcome:
        began = time.monotonic()
        await self._load.leaving(injection.seconds)
        return self._done(injection, None, began)

    async def _send_rubbish(self, injection: Injection) -> InjectionOutcome:
        port = injection.kind.name.removeprefix("rubbish-")
        name = self._target(injection, self.restarting | self._stopped)
        if name is None:
            return Skipped(injection, "every target is stopped or restarting")
        began = time.monotonic()
        sent = await self._rubbish.send(self._endpoints, name, port, injection.seconds, random.Random(injection.seed))
        if not sent:
            return Skipped(injection, f"{name} did not report its ports")
        detail = ", ".join(f"{count} {form}" for form, count in sent.most_common())
        return self._done(injection, name, began, f"{name}: {detail}")

    # Targets

    def _target(self, injection: Injection, barred: set[str]) -> str | None:
        whom = injection.kind.target_role
        if whom is TargetRole.PROXY:
            return None if "proxy" in barred else "proxy"
        return pick(injection.choice, [name for name in self._endpoints.of_role(whom) if name not in barred])

    def _done(self, injection: Injection, name: str | None, began: float, detail: str = "") -> Injected:
        address = str(self._endpoints.workers[name]) if name is not None and name != "proxy" else None
        return Injected(injection, name, address, began, time.monotonic(), detail)
