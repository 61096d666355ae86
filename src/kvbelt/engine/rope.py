"""Rotary positions that no neighbour of a request changes.

LongRoPE has two sets of frequencies, for contexts up to the original length and for longer ones. transformers chooses
one by the longest position of a step. So a request's tokens would depend on who else is in its step, and its later keys
would not fit those it has cached. Here, as in vLLM, the longest request that may come decides, once.
"""

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_LONGROPE = "longrope"


def settle_longrope(model: torch.nn.Module, most_tokens: int) -> str:
    """Choose the frequencies for requests of at most ``most_tokens``. Returns the choice, or "" if there is none.

    KV of one choice is of no use to the other.
    """
    chosen = ""
    for module in model.modules():
        if getattr(module, "rope_type", None) != _LONGROPE:
            continue
        rotary: Any = module
        original: int = rotary.config.rope_parameters["original_max_position_embeddings"]
        chosen = "long" if most_tokens > original else "short"
        frequencies, _ = ROPE_INIT_FUNCTIONS[_LONGROPE](
            rotary.config, rotary.inv_freq.device, seq_len=original + 1 if chosen == "long" else original
        )
        rotary.inv_freq.copy_(frequencies)
        rotary.rope_type = "default"  # so that no step changes them
    return chosen


def switches(config: Any) -> list[int]:
    """Lengths at which a model of this configuration may compute something else."""
    found = {
        getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "initial_context_length")
    }
    parameters: Any = getattr(config, "rope_parameters", None) or {}
    for part in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        found.add(part.get("original_max_position_embeddings"))
    return sorted(length for length in found if isinstance(length, int) and length > 0)
