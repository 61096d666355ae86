"""What placement knows about a request, and about the work on one worker. Pure; the caller gives the time."""

from bisect import bisect_left
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf
from typing import NamedTuple

from kvbelt.pacing.costs import DEFAULT_COSTS, StepCosts
from kvbelt.routing.levels import ServiceLevels
from kvbelt.routing.prefixes import Prefix
from kvbelt.wire.health import Role
from kvbelt.wire.steps import StepsNow


class Action(StrEnum):
    SPLIT = "split"  #: one worker computes the prompt, another one generates
    WHOLE = "whole"  #: one worker does it all


@dataclass(slots=True, eq=False)
class Demand:
    """A request that waits for a worker."""

    tokens: int  #: length of the prompt; may be an estimate
    output: int  #: expected length of the answer
    arrived: float
    levels: ServiceLevels
    splittable: bool = True
    whole_on: Role = Role.DECODE  #: the role that answers a request which ``split`` cannot split
    silent: bool = False  #: the answer comes in one piece: its first token is seen only if it is split
    prefix: Prefix | None = None  #: the prompt, if workers may hold a part of it
    held: dict[str, int] = field(default_factory=dict)  #: cached prompt tokens, by incarnation of the worker
    exclude: frozenset[str] = frozenset()  #: incarnations that failed it

    @property
    def due(self) -> float:
        """When its first token is due."""
        return self.arrived + self.levels.ttft


class Plan(NamedTuple):
    """The workers that a request may get, with their cost."""

    action: Action
    reason: str
    prefill: "WorkerBook"
    decode: "WorkerBook"
    tokens: int  #: prompt tokens to compute
    wait: float  #: seconds until the prefill worker is free
    own: float  #: seconds of computing the prompt
    broken: float = 0.0  #: levels that it would break

    @property
    def ends(self) -> float:
        """Seconds from now until the prompt is computed."""
        return self.wait + self.own


@dataclass(slots=True, eq=False)
class Booking:
    """A request that is placed, until it ends."""

    demand: Demand
    action: Action
    reason: str  #: why this action; see ``wire/reasons.py``
    prefill: "WorkerBook"  #: computes the prompt
    decode: "WorkerBook"  #: generates; for WHOLE the same
    tokens: int  #: prompt tokens to compute
    placed: float
    predicted: float  #: when its first token is expected
    own: float  #: seconds that its prompt is expected to take
    first_token: float | None = None
    generated: int = 1  #: tokens so far, counted by the caller; valid after the first token
    allowed: float = inf  #: most mean seconds between tokens

    @property
    def kv_tokens(self) -> int:
        """KV tokens that the request reads in a step, halfway through its answer."""
        return self.demand.tokens + self.demand.output // 2

    def slack(self, now: float, step: float) -> float:
        """Seconds of delay that still keep the TPOT level, if each later token takes ``step``."""
        output, generated, begun = self.demand.output, self.generated, self.first_token
        if generated >= output:
            output = generated + 1
        if begun is None:
            begun = now
        return self.allowed * (output - 1) - (now - begun) - (output - generated) * step


#: A decode is planned to end within this share of its TPOT level.
TPOT_AIM = 0.96

_ROUNDING = 1e-9

#: A decode that lengthens a step by at most this share of the level is free for the others, as it is on a GPU.
SMALL_SHARE = 0.02

#: Share of a worker's KV memory that may be booked. Beyond it, an engine evicts and preempts.
MOST_KV = 0.9


#: Costs of fewer steps are not believed: the first steps of an engine are slow, and a worker that seems slow gets no
#: others.
TELLING_STEPS = 8

#: A shorter prompt takes mostly fixed costs, which say nothing about the pace.
_TELLING_TOKENS = 256

#: Weight of one prompt in the pace.
_WEIGHT = 0.1


class Pace:
    """How slow workers are that have not reported their costs, as a multiple of the default costs.

    These workers share one, so that none is avoided because of a slow start.
    """

    scale = 1.0

    def learn(self, predicted: float, took: float) -> None:
        ratio = min(took / predicted, 10.0)
        self.scale = min(max(self.scale * (1.0 + _WEIGHT * (ratio - 1.0)), 1e-4), 1e4)


class WorkerBook:
    """One incarnation of a worker, with the work booked on it."""

    used_at = -inf  #: moment of its latest request
    settled = True  #: False: it is used only if no other worker is left
    most_prompt_tokens = 8192  #: in one step
    most_requests = 256  #: that run at once
    kv_capacity: int | None = None  #: tokens; None: unknown
    step = DEFAULT_COSTS.base  #: seconds of a step without prompts
    lag = 0.0  #: mean seconds by which prompts ended later than predicted
    begun = 0.0  #: when it began the first of its prompts
    free_at = 0.0  #: when its prompts are computed, if the first one is not late
    arriving = 0  #: requests that will generate here once another worker has computed their prompt
    kv_tokens = 0  #: read in a step by the running decodes
    kv_booked = 0  #: booked for all requests that are, or will be, here
    work = 0.0  #: seconds that were booked here lately

    def __init__(self, incarnation: str, lean: Role) -> None:
        self.incarnation = incarnation
        self.lean = lean  #: its configured role
        self.prompts: list[Booking] = []  #: to be computed here, in order
        self.decodes: set[Booking] = set()  #: that generate here
        self.pace = Pace()
        self._costs = DEFAULT_COSTS
        self._cut: dict[float, int] = {}  # prompt tokens of a step beside the decodes, by ITL level
        self._own = 0.0  # seconds of all prompts
        # A lower bound of the decodes' slacks at a moment. It saves a look at each decode in most decisions. It is -inf
        # until somebody asks.
        self._least_slack, self._slack_at, self._longest = -inf, 0.0, 0
        self._slacks: list[float] | None = None  # of all, at that moment

    def learn(self, steps: StepsNow) -> None:
        self.most_prompt_tokens, self.most_requests = steps.most_prompt_tokens, steps.most_requests
        if steps.costs.samples >= TELLING_STEPS:
            self.costs = steps.costs

    @property
    def costs(self) -> StepCosts:
        return self._costs

    @costs.setter
    def costs(self, costs: StepCosts) -> None:
        self._costs = costs
        self._least_slack = -inf
        self._decodes_changed()

    @property
    def scale(self) -> float:
        """The factor by which prompts take longer than ``costs`` says."""
        return 1.0 if self._costs.samples else self.pace.scale

    # Prompts

    def add_prompt(self, booking: Booking, now: float) -> None:
        if not self.prompts:
            self.begun, self._own = now, 0.0
        self._own += booking.own
        self.free_at = self.begun + self._own
        self.prompts.append(booking)

    def remove_prompt(self, booking: Booking, now: float) -> None:
        """Remove a prompt that is computed or given up."""
        if booking is self.prompts[0]:
            self.begun = now
        self.prompts.remove(booking)
        self._own -= booking.own
        # From the present prompt's begin, so that small errors of predictions do not add up.
        self.free_at = self.begun + self._own

    def computed(self, booking: Booking, now: float) -> None:
        """Learn from the duration of the worker's first prompt."""
        if not self.prompts or booking is not self.prompts[0]:
            return
        took, expected = now - self.begun, booking.own
        if self._costs.samples:
            # Never less than 0: a worker that is used would seem to be faster than those that are not.
            self.lag = max(0.0, self.lag + _WEIGHT * max(-expected, min(took - expected, expected)))
        elif booking.tokens >= _TELLING_TOKENS:
            self.pace.learn(expected, took)

    def late(self, now: float) -> float:
        """Seconds by which the worker's first prompt is late."""
        return now - self.begun - self.prompts[0].own if self.prompts else 0.0

    def wait(self, now: float) -> float:
        """Expected seconds until the worker's prompts are computed. A late prompt is expected to double its delay."""
        if not self.prompts:
            return 0.0
        late = now - self.begun - self.prompts[0].own
        return self.free_at - now + (2 * late if late > 0.0 else 0.0)

    # Decodes

    def add_decode(self, booking: Booking, now: float) -> None:
        before, allowed = self.step, booking.demand.levels.mean_itl
        self.decodes.add(booking)
        self.kv_tokens += booking.kv_tokens
        self._decodes_changed()
        if allowed is not None:
            booking.allowed = TPOT_AIM * allowed
        if self._least_slack == -inf:
            return
        self._longest = max(self._longest, booking.demand.output)
        self._least_slack -= now - self._slack_at + self._longest * max(0.0, self.step - before)
        self._least_slack = min(self._least_slack, booking.slack(now, self.step))
        self._slack_at = now

    def remove_decode(self, booking: Booking) -> None:
        self.decodes.remove(booking)
        self.kv_tokens -= booking.kv_tokens
        self._decodes_changed()
        if not self.decodes:
            self._least_slack = -inf

    def _decodes_changed(self) -> None:
        costs = self._costs
        self.step = costs.base + costs.decode * len(self.decodes) + costs.kv_token * self.kv_tokens
        self._cut.clear()
        self._slacks = None

    def broken(self, delay: float, now: float) -> int:
        """How many running decodes would break their TPOT level if prompts delayed them by so many more seconds."""
        delay += self.wait(now)
        if delay <= self._least_slack - (now - self._slack_at) - _ROUNDING:
            return 0
        slacks = self._slacks
        if slacks is None or now != self._slack_at:
            step = self.step
            slacks = self._slacks = sorted([one.slack(now, step) for one in self.decodes])
            self._least_slack, self._slack_at = slacks[0], now
            self._longest = max(1, *(one.demand.output - one.generated for one in self.decodes))
        return bisect_left(slacks, delay)

    # Room

    @property
    def requests(self) -> int:
        return len(self.decodes) + len(self.prompts) + self.arriving

    def has_room(self, tokens: int) -> bool:
        """Whether one more request of ``tokens``, including its answer, can run here."""
        requests = self.requests
        if requests >= self.most_requests:
            return False
        if not requests:
            return True  # the engine refuses a request that is too large even alone
        return self.kv_capacity is None or self.kv_booked + tokens <= MOST_KV * self.kv_capacity

    def decode_step(self, more: int, more_kv: int) -> float:
        """Seconds of a step without prompts after ``more`` decodes have joined, which read ``more_kv`` tokens."""
        return self.step + self._costs.decode * more + self._costs.kv_token * more_kv

    def crowding(self, demand: Demand, mean_itl: float) -> float:
        """Shares of the mean time between tokens that one more decode takes from the decodes here, added up."""
        others = len(self.decodes) + self.arriving
        if not others:
            return 0.0
        share = (self._costs.decode + self._costs.kv_token * demand.tokens) / mean_itl
        return others * (share - SMALL_SHARE) if share > SMALL_SHARE else 0.0

    def too_slow_for(self, demand: Demand) -> bool:
        """Whether this worker would generate too slowly for the request's levels."""
        step, levels = self.decode_step(self.arriving + 1, demand.tokens), demand.levels
        itl, tpot = levels.itl, levels.tpot
        return (itl is not None and step > itl) or (tpot is not None and step > TPOT_AIM * tpot)

    def per_step(self, itl: float) -> int:
        """The most prompt tokens of a step here that keep the ITL level of the running decodes."""
        cut = self._cut.get(itl)
        if cut is None:
            decodes, most = len(self.decodes), self.most_prompt_tokens
            cut = self._cut[itl] = self._costs.prompt_tokens_within(itl, 0, decodes, self.kv_tokens, most)
        return cut

    def prefill_seconds(self, tokens: int, itl: float | None) -> tuple[float, float]:
        """Seconds that ``tokens`` more prompt tokens take after the waiting ones, and by which they delay decodes."""
        costs, step, decodes = self._costs, self.step, self.decodes
        per_step = self.most_prompt_tokens if itl is None or not decodes else self.per_step(itl)
        steps = -(-tokens // per_step)
        around = step + costs.prefill
        own = steps * around + tokens * (costs.token + costs.token_context * (tokens / 2))
        if self.prompts:
            # The last step of the prompt before this one also computes a part of it.
            own -= around * (steps - tokens / per_step)
        scale = 1.0 if costs.samples else self.pace.scale
        delay = scale * max(0.0, own - steps * step) if decodes else 0.0
        own *= scale
        return max(own / 2, own + self.lag), delay

    def least_seconds(self, tokens: int) -> float:
        """Seconds that a prompt takes on an idle worker."""
        costs = self._costs
        seconds = -(-tokens // self.most_prompt_tokens) * (costs.base + costs.prefill)
        seconds += tokens * (costs.token + costs.token_context * (tokens / 2))
        return seconds if costs.samples else seconds * self.pace.scale
