"""The seconds of an engine's step as a function of its work, and what follows from them.

A step of an LLM engine reads all weights (``base``), the KV of every running decode (``kv_token``), and computes its
prompt tokens (``token``), each of which attends to the tokens before it (``token_context``).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, sqrt

#: A step is planned to end within this share of the ITL level, because a client sees more than the step: on two H200
#: the ITL's 99th percentile was 54 to 74 ms with steps planned for 45 ms, and 34 to 47 ms with 36 ms.
AIM = 0.72

#: A step beside running decodes carries at least so many prompt tokens, so that a prompt always advances.
LEAST_PROMPT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of a step: a sum of these, each times its amount of work."""

    base: float  #: any step
    prefill: float  #: a step with prompt tokens, in addition
    token: float  #: a prompt token
    token_context: float  #: a prompt token, for each token before it
    decode: float  #: a running decode
    kv_token: float  #: a token of KV that the running decodes read
    sigma: float = 0.0  #: relative standard deviation of what the model leaves unexplained
    samples: int = 0  #: steps it was learned from; 0: a default

    def step_seconds(self, prompt_tokens: int, context: int, decodes: int, kv_tokens: int) -> float:
        """A step with ``prompt_tokens`` after ``context`` computed ones, beside decodes that read ``kv_tokens``."""
        seconds = self.base + self.decode * decodes + self.kv_token * kv_tokens
        if prompt_tokens:
            seconds += self.prefill + prompt_tokens * (self.token + self.token_context * (context + prompt_tokens / 2))
        return seconds

    def prefill_seconds(self, tokens: int, context: int, per_step: int, decodes: int, kv_tokens: int) -> float:
        """All steps that compute ``tokens`` prompt tokens after ``context`` cached ones, ``per_step`` in each."""
        steps = ceil(tokens / per_step)
        around = self.base + self.prefill + self.decode * decodes + self.kv_token * kv_tokens
        return steps * around + tokens * (self.token + self.token_context * (context + tokens / 2))

    def prompt_tokens_within(self, seconds: float, context: int, decodes: int, kv_tokens: int, most: int) -> int:
        """The prompt tokens of a step that keeps an ITL level of ``seconds``, at most ``most``."""
        left = AIM * seconds - self.base - self.prefill - self.decode * decodes - self.kv_token * kv_tokens
        each, attention = self.token + self.token_context * context, self.token_context / 2
        if left <= 0:
            return min(most, LEAST_PROMPT_TOKENS)
        # The positive root of: attention * tokens ** 2 + each * tokens = left. In this form it holds without attention.
        slope = each + sqrt(each * each + 4 * attention * left)
        return min(most, max(LEAST_PROMPT_TOKENS, int(2 * left / slope) if slope else most))


def as_one_prompt(prompts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The tokens and the context of one prompt that costs a step what these cost, of (tokens, context) each.

    It attends to as many tokens as all of them together; the context of several short prompts may be less than 0.
    """
    tokens = attended = 0
    for count, context in prompts:
        tokens += count
        attended += count * (2 * context + count)  # twice, to stay whole
    return tokens, round((attended / tokens - tokens) / 2) if tokens else 0


#: Of an 8B model on one current data-centre GPU, roughly. Only until a worker's own steps are known.
DEFAULT_COSTS = StepCosts(base=6e-3, prefill=2e-3, token=30e-6, token_context=0.0, decode=0.05e-3, kv_token=40e-9)
