"""The parameters of a simulated engine."""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import hypot

from kvbelt.pacing.costs import StepCosts
from kvbelt.pacing.learner import StepLearner


@dataclass(frozen=True, slots=True)
class EngineModel:
    costs: StepCosts  #: ``sigma`` is the noise of a step with prompts
    most_prompt_tokens: int = 8192  #: tokens of a step, those of decodes included
    most_requests: int = 64
    kv_capacity: int = 780_000  #: tokens
    looks_ahead: bool = True  #: but not during a step that sends KV
    itl: float | None = None  #: seconds; prompts beside decodes are cut to keep this level
    overlap: float = 0.0  #: hidden share of the smaller of ``costs.prefill`` and the decodes' reads
    launch: float = 0.0  #: seconds of CPU for each prompt token of a step, before the GPU has it
    jitter: float = 0.0  #: mean seconds by which a step with prompts is late, exponentially distributed


_PROMPTS = ((0, 0), (512, 2048), (1024, 3072), (2048, 2048), (7500, 0))
_DECODES = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48)
_KV_OF_A_DECODE = 7600


@lru_cache(maxsize=64)
def learned_costs(model: EngineModel) -> StepCosts:
    """The costs that the worker reports, learned from steps of every kind as by real workers.

    They are a compromise where a step is shorter than the sum of its parts, and leave a step's noise unexplained.
    """
    learner, costs = StepLearner(), model.costs
    for _ in range(4):
        for (tokens, context), decodes in product(_PROMPTS, _DECODES):
            if not tokens and not decodes:
                continue
            kv = decodes * _KV_OF_A_DECODE
            seconds = costs.step_seconds(tokens, context, decodes, kv)
            if tokens:
                reads = costs.decode * decodes + costs.kv_token * kv
                seconds -= model.overlap * min(costs.prefill, reads)
                seconds += model.jitter
                seconds += model.launch * tokens / 2  # on average half of it is hidden
            learner.observe(seconds, tokens, context, decodes, kv)
    return replace(learner.costs, sigma=hypot(learner.costs.sigma, costs.sigma))
