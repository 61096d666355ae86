"""Whether a chat's answer is plain text from its first token on, on a server with a reasoning parser.

Where the proxy gives a chat's first token from here, the rest comes from a decode server as a completion, which nobody
parses. That is right only if nothing is to be parsed: vLLM's own parser says that reasoning has ended in the prompt, as
where a chat template switches thinking off.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

Reasoning = Literal["none", "open", "ended"]


class ReasoningOfPrompts:
    """Asks the parser of ``vllm_config``, as vLLM does when it begins to stream an answer."""

    def __init__(self, vllm_config: Any) -> None:
        self._config = vllm_config
        options = getattr(vllm_config, "structured_outputs_config", None)
        self._name: str = getattr(options, "reasoning_parser", "") or ""
        self._has_ended: Callable[[Sequence[int]], bool] | None = None

    def of(self, prompt_token_ids: Sequence[int] | None) -> Reasoning:
        """``none``: the server has no parser. ``open``: the answer may have reasoning in it."""
        if not self._name:
            return "none"
        if prompt_token_ids is None:
            return "open"
        if self._has_ended is None:
            self._has_ended = _parser_of(self._config, self._name)
        return "ended" if self._has_ended(prompt_token_ids) else "open"


def _parser_of(vllm_config: Any, name: str) -> Callable[[Sequence[int]], bool]:
    try:
        from vllm.reasoning import ReasoningParserManager  # noqa: PLC0415 -- vLLM has moved them before
        from vllm.tokenizers import cached_tokenizer_from_config  # noqa: PLC0415

        parser = ReasoningParserManager.get_reasoning_parser(name)(
            cached_tokenizer_from_config(vllm_config.model_config)
        )
    except Exception:  # noqa: BLE001 -- a parser of anybody's: without its word, nothing is certain
        return lambda _: False
    return lambda prompt_token_ids: bool(parser.is_reasoning_end(list(prompt_token_ids)))


def keeps_special_tokens(sampling_params: Any) -> bool:
    """Whether an answer's text has them. Parsers ask for them, without the client's knowledge."""
    return sampling_params is not None and not getattr(sampling_params, "skip_special_tokens", True)
