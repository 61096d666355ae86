"""Whether the client may have the prefill worker's first token: only where the answer is exactly one server's.

On the fast path the client gets token 1 from the prefill worker. The decode worker continues after it, and takes it for
a part of the prompt. So everything that depends on *which output tokens came before*, on *how many*, or on *the prompt*
would differ on the decode worker:

* penalties and bad words look at earlier output tokens; ``min_tokens`` and a seed's draws count them;
* logprobs, echo and prompt logprobs report what the decode worker sees as the prompt;
* a stop string may begin in token 1 and end in token 2; guided decoding and tool calls keep a state;
* several prompts or choices have several first tokens.

For these the decode worker derives token 1 itself from the transferred KV, and for every field that is not on the lists
below. A field set to its neutral value counts as absent.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from kvbelt.routing.view import VIEWED, RequestView
from kvbelt.wire.fields import Acts, acting

#: Fields that change neither which tokens may come after token 1, nor how they are reported, or that are
#: carried to the decode leg unchanged and act on each token by itself.
CARRIED = acting(Acts.ON_A_TOKEN)

#: Fields that act on the prompt, which the prefill worker renders, or on nothing that a worker generates.
SPENT_ON_PROMPT = acting(Acts.ON_THE_PROMPT, Acts.ON_NOTHING)

_KNOWN = VIEWED | CARRIED | SPENT_ON_PROMPT


class ResponseMode(Enum):
    """How a request is answered, if it is split."""

    FAST = auto()  #: token 1 from the prefill worker, at once
    REDERIVE = auto()  #: everything from the decode worker, over the transferred KV
    PREFILL_ONLY = auto()  #: one token is asked for: the prefill worker's answer is the answer


@dataclass(frozen=True, slots=True)
class Decision:
    """``reason``, of ``wire/reasons.py``: why not FAST."""

    mode: ResponseMode
    reason: str | None = None


FAST = Decision(ResponseMode.FAST)
PREFILL_ONLY = Decision(ResponseMode.PREFILL_ONLY)


def first_token(view: RequestView, names: Iterable[str], *, num_prompts: int) -> Decision:
    """Where token 1 comes from.

    Args:
        view: the request's typed fields.
        names: the names of all its fields that are not null.
        num_prompts: its number of prompts.
    """
    if token_limit(view) == 1:
        return PREFILL_ONLY
    reason = _why_not_fast(view, num_prompts)
    if reason is None and not _KNOWN.issuperset(names):
        reason = "unknown_field"
    return FAST if reason is None else Decision(ResponseMode.REDERIVE, reason)


def token_limit(view: RequestView) -> int | None:
    """The client's ``max_tokens``, by either of its names."""
    return view.max_tokens if view.max_completion_tokens is None else view.max_completion_tokens


def _why_not_fast(view: RequestView, num_prompts: int) -> str | None:
    greedy = view.temperature == 0
    checks: tuple[tuple[bool, str], ...] = (
        (num_prompts != 1, "many_prompts"),
        (view.n not in (None, 1), "n"),
        (view.best_of not in (None, 1), "best_of"),
        (bool(view.echo), "echo"),
        # completions: 0 asks for the chosen token's; chat: false asks for none
        (view.logprobs is not None and view.logprobs is not False, "logprobs"),
        (view.top_logprobs is not None, "logprobs"),
        (view.prompt_logprobs is not None, "prompt_logprobs"),
        (bool(view.stop), "stop"),
        (view.seed is not None and not greedy, "seed"),
        (bool(view.presence_penalty) or bool(view.frequency_penalty), "penalty"),
        (view.repetition_penalty not in (None, 1.0), "penalty"),
        # a minimum of 1 forbids only that token 1 ends the answer, which the prefill worker obeys
        ((view.min_tokens or 0) > 1, "min_tokens"),
        (bool(view.tools) and view.tool_choice != "none", "tools"),
        (bool(view.functions), "tools"),
        (view.response_format is not None and view.response_format.get("type") != "text", "guided"),
        (bool(view.stream_options and view.stream_options.continuous_usage_stats), "continuous_usage"),
    )
    return next((reason for applies, reason in checks if applies), None)
