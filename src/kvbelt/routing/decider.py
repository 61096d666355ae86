"""Whether a request can be split between a prefill and a decode worker. ``placement`` decides whether it is."""

from kvbelt.routing.exactness import Decision


def why_not_split(first: Decision, prompt_tokens: int, min_prompt_tokens: int) -> str | None:
    """A reason of ``wire/reasons.py``; None: it can be split.

    Args:
        first: where its first token may come from.
        prompt_tokens: the prompt's length; may be an estimate.
        min_prompt_tokens: shorter prompts are not split.
    """
    if prompt_tokens < min_prompt_tokens:
        return "short_prompt"
    if first.reason == "many_prompts":
        # Each prompt's KV would hold a slot until the last one's has come, and together they may not fit.
        return "many_prompts"
    return None
