"""A deployment under a virtual clock."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from typing import Protocol

from kvbelt.simulate.engine import Job, SimulatedEngine
from kvbelt.simulate.load import Following, Request
from kvbelt.simulate.model import EngineModel
from kvbelt.wire.health import Role


@dataclass(frozen=True, slots=True)
class Network:
    """Seconds of a request outside the engines."""

    reach: float  #: from the client until the engine has the prompt: HTTP, tokens
    reply: float  #: from the end of a step until the client has its token
    proxy: float  #: each way, for policies with a proxy
    handover: float  #: from the first token until the decode worker's engine has the KV, beyond ``reply``


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    name: str
    role: Role
    model: EngineModel
    dies: float | None = None  #: the moment of its death


class SimulatedWorker:
    """A worker with its prefix cache."""

    def __init__(self, spec: WorkerSpec, engine: SimulatedEngine) -> None:
        self.name, self.role, self.model = spec.name, spec.role, spec.model
        self.engine = engine
        self._held: OrderedDict[int, int] = OrderedDict()
        self._held_tokens = 0

    def held(self, request: Request) -> int:
        """Tokens of the request's prompt in the prefix cache."""
        if request.conversation is None:
            return request.held
        return min(self._held.get(request.conversation, 0), request.shared)

    def keep(self, request: Request, tokens: int) -> None:
        """Cache the request's KV. The oldest conversations leave if memory is short."""
        if request.conversation is None:
            return
        self._held_tokens += tokens - self._held.pop(request.conversation, 0)
        self._held[request.conversation] = tokens
        while self._held_tokens > self.model.kv_capacity:
            self._held_tokens -= self._held.popitem(last=False)[1]


class Policy(Protocol):
    """Sends requests to workers (``World.send``), on an event or at a moment of its own (``World.at``)."""

    #: Whether requests pass a proxy.
    proxied: bool
    #: ITL level that engines keep by cutting prompts.
    itl: float | None

    def enter(self, world: "World") -> None: ...
    def leave(self, worker: SimulatedWorker) -> None: ...
    def arrived(self, request: Request, now: float) -> None: ...
    def first_token(self, request: Request, now: float) -> None: ...
    def ended(self, request: Request, now: float) -> None: ...


class World:
    def __init__(
        self,
        specs: Sequence[WorkerSpec],
        policy: Policy,
        requests: Sequence[Request],
        network: Network,
        *,
        following: Following | None = None,
        seed: int = 1,
    ) -> None:
        self.policy, self.network = policy, network
        self.requests = list(requests)
        self._following = following
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._number = 0
        self._places: dict[Request, _Place] = {}
        self._proxy = network.proxy if policy.proxied else 0.0
        self.workers = []
        for index, spec in enumerate(specs):
            model = replace(spec.model, itl=policy.itl)
            engine = SimulatedEngine(model, self, seed * 1000 + index, self._on_first_token, self._on_end)
            self.workers.append(SimulatedWorker(spec, engine))
            if spec.dies is not None:
                self.at(spec.dies, functools.partial(self._die, self.workers[-1]))

    def at(self, moment: float, call: Callable[[float], None]) -> None:
        self._number += 1
        heappush(self._events, (moment, self._number, call))

    def run(self) -> None:
        """Process events until none is left."""
        for request in self.requests:
            self._number += 1
            self._events.append((request.at + self._proxy, self._number, self._arrival(request)))
        heapify(self._events)
        self.policy.enter(self)
        events = self._events
        while events:
            now, _, call = heappop(events)
            call(now)

    def _arrival(self, request: Request) -> Callable[[float], None]:
        return lambda now: self.policy.arrived(request, now)

    # What a policy does

    def send(self, request: Request, prefill: SimulatedWorker, decode: SimulatedWorker, now: float) -> None:
        """Have ``prefill`` compute the prompt and ``decode`` generate. Both may be the same worker."""
        prompt, output = request.prompt + request.generated, request.output - request.generated
        job = Job(request, prompt, output, prefill.held(request), generates=prefill is decode)
        self._bring(_Place(prefill, decode, job), now + self.network.reach)

    def generated(self, request: Request, now: float) -> int:
        """Tokens of the answer so far."""
        place = self._places.get(request)
        return request.generated + (place.worker.engine.decode_steps_of(place.job, now) if place is not None else 0)

    def _bring(self, place: "_Place", when: float) -> None:
        self._places[place.job.request] = place

        def reach(now: float) -> None:
            if place.worker.engine.dead:
                self._again(place.job.request, now)
            else:
                place.worker.engine.add(place.job, now)

        self.at(when, reach)

    # What engines tell

    def _on_first_token(self, job: Job, now: float) -> None:
        request = job.request
        place = self._places[request]
        place.worker.keep(request, job.prompt)
        request.generated += 1
        seen = now + self.network.reply + self._proxy
        if request.first_token is None:
            request.first_token = seen
        else:
            request.gaps.append((seen - request.last_token, 1))
        request.last_token = seen
        if job.output == 1:
            self._finish(request, place.worker, now)
            return

        def tell(now: float) -> None:
            if self._places.get(request) is not place:
                return  # the worker died meanwhile
            self.policy.first_token(request, now)
            if not job.generates:
                rest = Job(request, job.prompt, job.output, 0, generates=True, received=True)
                rest.last_token = job.last_token
                self._bring(_Place(place.decode, place.decode, rest), now + self.network.handover)

        self.at(now + self.network.reply, tell)

    def _on_end(self, job: Job, now: float) -> None:
        worker = self._places[job.request].worker
        self._generated(job, worker, now)
        self._finish(job.request, worker, now)

    def _generated(self, job: Job, worker: SimulatedWorker, now: float) -> None:
        """Note the tokens after the first one."""
        request, stretches = job.request, worker.engine.stretches
        request.generated += worker.engine.decode_steps_of(job, now)
        if not job.joined or job.joined > len(stretches):
            return
        first = stretches[job.joined - 1]
        request.gaps.append((first.begun + first.step - job.last_token, 1))
        if first.steps > 1:
            request.gaps.append((first.step, first.steps - 1))
        request.gaps += [(one.step, one.steps) for one in stretches[job.joined :]]
        last = stretches[-1]
        request.last_token = last.begun + last.step * last.steps + self.network.reply + self._proxy

    def _finish(self, request: Request, worker: SimulatedWorker, now: float) -> None:
        request.ended = True
        worker.keep(request, request.prompt + request.output)
        del self._places[request]

        def tell(now: float) -> None:
            self.policy.ended(request, now)
            later = self._following(request, now + self._proxy) if self._following is not None else None
            if later is not None:
                self.requests.append(later)
                self.at(later.at + self._proxy, self._arrival(later))

        self.at(now + self.network.reply, tell)

    # Deaths

    def _die(self, worker: SimulatedWorker, now: float) -> None:
        """Place the worker's requests again, with the tokens already sent as a part of the prompt."""
        lost = worker.engine.stop(now)
        self.policy.leave(worker)
        for job in lost:
            self._generated(job, worker, now)
            self._again(job.request, now)

    def _again(self, request: Request, now: float) -> None:
        del self._places[request]
        self.policy.ended(request, now)
        self.policy.arrived(request, now)


@dataclass(frozen=True, slots=True)
class _Place:
    """The workers of a running request."""

    worker: SimulatedWorker  #: that has the job
    decode: SimulatedWorker
    job: Job
