"""The layers of a drafter (speculative decoding) among those of vLLM's KV cache: which they are, and whose.

The target's answers do not depend on them. Wrong KV there makes wrong drafts, which are not accepted.
"""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from kvbelt.vllm.identity import model_fingerprint

KVT = TypeVar("KVT")

#: vLLM's methods whose drafter has KV of its own, and those without: they draft from the tokens or from hidden states.
WITH_KV = frozenset({"draft_model", "eagle", "eagle3", "mtp", "dflash", "dspark"})
WITHOUT_KV = frozenset({"ngram", "ngram_gpu", "suffix", "medusa"})

#: A drafter that is loaded beside the target, or as a part of it.
_PREFIXES = ("draft_model.", "mtp.")

_NUMBER = re.compile(r"\.(\d+)(?:\.|$)")


def parted(kv_caches: Mapping[str, KVT], vllm_config: Any) -> tuple[dict[str, KVT], dict[str, KVT]]:
    """The layers of the model, and those of its drafter."""
    speculative, target = vllm_config.speculative_config, vllm_config.model_config
    if speculative is None or speculative.method not in WITH_KV:
        return dict(kv_caches), {}
    num_layers = target.get_num_layers(vllm_config.parallel_config)
    of_drafter = {name: kv for name, kv in kv_caches.items() if drafts(name, num_layers)}
    return {name: kv for name, kv in kv_caches.items() if name not in of_drafter}, of_drafter


def drafts(layer_name: str, num_layers: int) -> bool:
    """Whether a layer is a drafter's, beside a target of so many layers: vLLM numbers both together."""
    number = _NUMBER.search(layer_name)
    return layer_name.startswith(_PREFIXES) or (number is not None and int(number.group(1)) >= num_layers)


def drops_a_block(speculative: Any) -> bool:
    """Whether vLLM computes the last block that its prefix cache has again: the drafter wants its hidden states."""
    if speculative is None:
        return False
    told = getattr(speculative, "use_eagle_block_drop", None)  # since 0.31
    return bool(told() if told is not None else speculative.use_eagle())


def fingerprint_of(speculative: Any, load_format: str) -> str:
    """Equal for drafters that make equal KV beside one target."""
    model = speculative.draft_model_config
    how = {"method": speculative.method, "quantization": model.quantization, "dtype": model.dtype}
    return model_fingerprint(model.model, model.revision, load_format, how)
