"""Simulates one worker's engine: steps of a continuous batch, each as long as its costs say.

An engine that looks ahead, as vLLM does, fixes a step when the step before it begins. So work that arrives during a
step is in the step after the next one. Steps without prompts are simulated many at a time, because the batch changes
between two of them only if work arrives.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Protocol

from kvbelt.simulate.load import Request
from kvbelt.simulate.model import EngineModel, learned_costs


class Clock(Protocol):
    def at(self, moment: float, call: Callable[[float], None]) -> None:
        """Schedule ``call`` for a moment of virtual time."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive steps of equal length with the same batch."""

    begun: float
    step: float  #: seconds of each
    steps: int


@dataclass(slots=True, eq=False)
class Job:
    """The part of a request that one engine does: its prompt, its answer, or both."""

    request: Request
    prompt: int
    output: int  #: tokens left to generate, the first one included
    cached: int  #: prompt tokens in the prefix cache
    generates: bool  #: False: it computes the first token only, and sends the KV
    received: bool = False  #: the KV was received, with the first token
    reached: float = 0.0
    left: int = field(init=False)
    last_token: float = 0.0  #: moment of the last token
    joined: int = 0  #: number of the first stretch that it generates in, from 1; 0: none yet
    first_step: int = 0  #: decode steps of the engine before it joined

    def __post_init__(self) -> None:
        self.left = 0 if self.received else max(1, self.prompt - self.cached)


class SimulatedEngine:
    """Calls ``on_first_token`` and ``on_end`` at the end of a step."""

    def __init__(
        self,
        model: EngineModel,
        clock: Clock,
        seed: int,
        on_first_token: Callable[[Job, float], None],
        on_end: Callable[[Job, float], None],
    ) -> None:
        self.model = model
        self._learned = learned_costs(model)
        self._clock = clock
        self._chance = Random(seed)
        self._on_first_token, self._on_end = on_first_token, on_end
        self._received: deque[Job] = deque()  # first in line, because they need no prompt tokens of a step
        self._arrived: deque[Job] = deque()
        self._prompts: list[Job] = []  # admitted
        self._ends: list[tuple[int, int, Job]] = []  # the decodes, a heap by their last decode step
        self._turn = count()
        self._steps = 0  # decode steps so far
        self._kv = 0  # that the decodes read
        self._kv_booked = 0
        self.stretches: list[Stretch] = []  #: with decodes, in order
        self.busy_seconds = 0.0
        self._now: Stretch | None = None  # running
        self._parts: list[tuple[Job, int]] = []  # its prompts
        self._version = 0
        self.dead = False

    def add(self, job: Job, now: float) -> None:
        if self.dead:
            return
        job.reached = now
        (self._received if job.received else self._arrived).append(job)
        running = self._now
        if running is None:
            self._start(now, now)
        elif running.steps > 1:
            # The running step is fixed, and with foresight the next one.
            fixed = int((now - running.begun) / running.step) + (2 if self.model.looks_ahead else 1)
            if fixed < running.steps:
                self._now = Stretch(running.begun, running.step, fixed)
                self._expect_end()

    def decode_steps_of(self, job: Job, now: float) -> int:
        """Tokens that the job has generated here, without the first one."""
        if not job.joined:
            return 0
        steps, running = self._steps - job.first_step, self._now
        if running is not None:
            steps += min(running.steps, int((now - running.begun) / running.step))
        return min(steps, job.output - 1)

    def stop(self, now: float) -> list[Job]:
        """Kill the worker, and return the jobs that it loses."""
        running = self._now
        if running is not None and self._ends and (steps := int((now - running.begun) / running.step)):
            self._steps += steps
            self.stretches.append(Stretch(running.begun, running.step, steps))
        self.dead = True
        self._version += 1
        jobs = [*self._received, *self._arrived, *self._prompts, *(job for _, _, job in self._ends)]
        self._received.clear()
        self._arrived.clear()
        self._prompts.clear()
        self._ends.clear()
        self._now = None
        return jobs

    # Steps

    def _start(self, now: float, seen: float) -> None:
        """Begin the next step. ``seen``: when its batch was fixed."""
        for queue in (self._received, self._arrived):
            while queue and queue[0].reached <= seen and self._has_room(queue[0]):
                job = queue.popleft()
                self._kv_booked += job.prompt + job.output
                if job.received:
                    self._join(job)
                else:
                    self._prompts.append(job)
        model, costs, decodes = self.model, self.model.costs, len(self._ends)
        self._parts = []
        if not decodes and not self._prompts:
            if self._received or self._arrived:  # later work finds an idle engine
                first = min(queue[0].reached for queue in (self._received, self._arrived) if queue)
                if first > seen:
                    self._start(now, now)
                    return
            self._now = None
            return
        reads = costs.decode * decodes + costs.kv_token * self._kv
        seconds = costs.base + reads
        if self._prompts:
            tokens, prompt_seconds = self._choose_prompts(decodes)
            seconds += costs.prefill - model.overlap * min(costs.prefill, reads) + prompt_seconds
            seconds *= max(0.5, 1 + costs.sigma * self._chance.gauss(0.0, 1.0))
            if model.jitter:
                seconds += self._chance.expovariate(1 / model.jitter)
            # With foresight the engine launches a step while the one before it runs.
            seconds += max(0.0, model.launch * tokens - (now - seen))
        steps = 1
        if not (self._prompts or self._received or self._arrived):
            steps = min(self._ends[0][0] - self._steps, max(1, int(_LONGEST_STRETCH / seconds)))
            seconds += costs.kv_token * decodes * (steps - 1) / 2
        self._now = Stretch(now, seconds, steps)
        self._expect_end()

    def _choose_prompts(self, decodes: int) -> tuple[int, float]:
        """Choose the step's prompt tokens. Returns their number and the seconds that they add."""
        model, costs = self.model, self.model.costs
        budget = max(0, model.most_prompt_tokens - decodes)
        if model.itl is not None and decodes:
            context = self._prompts[0].prompt - self._prompts[0].left
            budget = min(budget, self._learned.prompt_tokens_within(model.itl, context, decodes, self._kv, budget))
        chosen, seconds = 0, 0.0
        for job in self._prompts:
            tokens = min(budget - chosen, job.left)
            if tokens <= 0:
                break
            context = job.prompt - job.left
            seconds += tokens * (costs.token + costs.token_context * (context + tokens / 2))
            chosen += tokens
            self._parts.append((job, tokens))
        return chosen, seconds

    def _has_room(self, job: Job) -> bool:
        running = len(self._ends) + len(self._prompts)
        fits = self._kv_booked + job.prompt + job.output <= self.model.kv_capacity
        return running < self.model.most_requests and (fits or not running)

    def _join(self, job: Job) -> None:
        job.joined, job.first_step = len(self.stretches) + 1, self._steps
        self._kv += job.prompt + 1
        heappush(self._ends, (self._steps + job.output - 1, next(self._turn), job))

    def _expect_end(self) -> None:
        running = self._now
        assert running is not None
        self._version += 1
        version = self._version
        self._clock.at(
            running.begun + running.steps * running.step,
            lambda now: self._end(now) if version == self._version else None,
        )

    def _end(self, now: float) -> None:
        done = self._now
        assert done is not None
        self.busy_seconds += done.steps * done.step
        decodes = len(self._ends)
        finished: list[Job] = []
        if decodes:
            self._steps += done.steps
            self._kv += decodes * done.steps
            self.stretches.append(done)
            while self._ends and self._ends[0][0] <= self._steps:
                job = heappop(self._ends)[2]
                self._kv -= job.prompt + 1 + self._steps - job.first_step
                self._leave(job)
                finished.append(job)
        first: list[Job] = []
        for job, tokens in self._parts:
            job.left -= tokens
            if not job.left:
                self._prompts.remove(job)
                job.last_token = now
                first.append(job)
                if job.generates and job.output > 1:
                    self._join(job)
                else:
                    self._leave(job)
        foresight = self.model.looks_ahead and all(job.generates for job, _ in self._parts)
        seen = done.begun + (done.steps - 1) * done.step if foresight else now
        self._start(now, seen)
        for job in first:
            self._on_first_token(job, now)
        for job in finished:
            self._on_end(job, now)

    def _leave(self, job: Job) -> None:
        self._kv_booked -= job.prompt + job.output


#: Seconds of a stretch at most: placement counts tokens at its end.
_LONGEST_STRETCH = 0.1
