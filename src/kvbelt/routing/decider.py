"""Disaggregate or not?

The rule today: yes, unless one of the two sides cannot take part, or the prompt is shorter than a threshold.
"""

from dataclasses import dataclass

from kvbelt.routing.endpoint import Endpoint
from kvbelt.routing.exactness import FirstToken, Road

#: Bytes of English text that make a token, by the field's rule of thumb; a threshold needs no better estimate.
BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Decision:
    """``road`` None: one decode worker does it all, because of ``reason``."""

    road: Road | None
    reason: str | None = None


def decide(
    first: FirstToken,
    prefill: Endpoint | None,
    decode: Endpoint,
    *,
    prompt_tokens: int,
    min_prompt_tokens: int = 0,
    pairs_refused: bool = False,
) -> Decision:
    """The road of one request.

    Args:
        first: where its first token may come from.
        prefill: the prefill worker that would take it; None if none is ready that fits the decode worker.
        decode: the decode worker that would take it.
        prompt_tokens: the prompt's length, which may be an estimate.
        min_prompt_tokens: shorter prompts are not worth a transfer.
        pairs_refused: some prefill worker is ready, but none that fits.
    """
    if prefill is None:
        return Decision(None, "pairs_refused" if pairs_refused else "no_prefill_worker")
    if prompt_tokens < min_prompt_tokens:
        return Decision(None, "short_prompt")
    if first.road is Road.PREFILL_ONLY:
        return Decision(Road.PREFILL_ONLY)
    if first.reason == "many_prompts":
        # Each prompt's KV would hold a slot until the last one's has come, and together they may not fit.
        return Decision(None, "many_prompts")
    if decode.report.receiver is None:
        return Decision(None, "decode_has_no_receiver")
    return Decision(first.road, first.reason)
