"""How many tokens of a prompt vLLM computes in one step, changed while it runs."""

import logging
from typing import Any

log = logging.getLogger("kvbelt.vllm")


class ChunkLimit:
    """vLLM's ``long_prefill_token_threshold``, which its scheduler reads anew for each step."""

    def __init__(self, config: Any) -> None:
        """``config``: the scheduler configuration, the object that vLLM's scheduler holds."""
        self._config = config
        # The operator's own; 0: none.
        self._own: int | None = getattr(config, "long_prefill_token_threshold", None)
        if self._own is None or not config.enable_chunked_prefill:
            log.warning(
                "this server cannot keep a level between tokens beside prompts: %s",
                "chunked prefill is off" if self._own is not None else "vLLM has no long_prefill_token_threshold",
            )
            self._own = None

    def set(self, tokens: int) -> None:
        """At most so many of each prompt from the next step on; 0: as the operator has it."""
        own = self._own
        if own is not None:
            self._config.long_prefill_token_threshold = min(tokens, own) if tokens and own else tokens or own
