"""What the server's generation config does to answers."""

from typing import Any

from kvbelt.wire.health import AnswerDefaults


def answer_defaults(model: Any) -> AnswerDefaults:
    """Of vLLM's ``ModelConfig``: the defaults that its OpenAI server takes from there."""
    defaults = model.get_diff_sampling_param()
    # A folder or an option limits every answer; the model's own file, only those of requests that say nothing.
    unless_asked = defaults.get("max_tokens")
    own = model.generation_config in ("auto", "vllm")
    return AnswerDefaults(
        unless_asked,
        (model.override_generation_config or {}).get("max_new_tokens") if own else unless_asked,
        penalties=bool(defaults.get("presence_penalty") or defaults.get("frequency_penalty")),
    )
