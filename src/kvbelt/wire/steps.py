"""What a worker says about its engine's steps: how long they take, and what it has to do now."""

from math import inf
from typing import Annotated

import msgspec

from kvbelt.pacing.costs import StepCosts

_Amount = Annotated[int, msgspec.Meta(ge=0)]
_Limit = Annotated[int, msgspec.Meta(ge=1)]


class StepsNow(msgspec.Struct, frozen=True, kw_only=True):
    costs: StepCosts
    prompt_tokens: _Amount  #: of accepted prompts, not computed yet; cached ones are not counted
    decodes: _Amount  #: requests that generate
    kv_tokens: _Amount  #: tokens of KV that those read in a step
    most_prompt_tokens: _Limit  #: in one step, when no decode is running
    most_requests: _Limit  #: that run at once
    most_kv_tokens: _Limit | None = None  #: that fit its KV memory; None: an older version
    host_kv_tokens: _Amount = 0  #: that fit the host memory from which it loads prompts

    @property
    def most_held_tokens(self) -> int | None:
        """Tokens of prompts and answers that it can remember; None: unknown."""
        return None if self.most_kv_tokens is None else self.most_kv_tokens + self.host_kv_tokens

    def __post_init__(self) -> None:
        """Require costs that can be added and compared."""
        c = self.costs
        seconds = (c.base, c.prefill, c.token, c.token_context, c.decode, c.kv_token, c.sigma)
        if not (min(seconds) >= 0.0 and sum(seconds) < inf):
            raise ValueError(f"costs are {c}; each must be a number, and none less than 0")
