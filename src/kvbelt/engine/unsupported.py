"""Models whose configuration shows that the embedded engine cannot serve them. Needs no torch."""

from collections.abc import Callable
from typing import Any

#: Kinds of layers that attention over pages serves.
_LAYERS = {"full_attention", "sliding_attention"}


def unsupported(config: Callable[[str], Any], text: Callable[[str], Any]) -> str | None:
    """Why a model cannot be served; None: nothing in its configuration says so.

    Args:
        config: gives a field of config.json by its name; None: it is not there.
        text: the same of the part that describes the decoder; for a plain language model it is ``config``.
    """
    kind = config("model_type")
    if config("is_encoder_decoder"):
        return f"model type {kind!r} is an encoder-decoder; only causal language models can be served"
    if text("kv_lora_rank"):
        return f"model type {kind!r} uses latent attention (MLA), which the embedded engine cannot page"
    others = set(text("layer_types") or ()) - _LAYERS
    if others:
        return f"model type {kind!r} has layers of type {sorted(others)}; only attention layers can be served"
    return None
