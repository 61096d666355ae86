"""What a prompt's KV depends on, of vLLM's requests."""

from typing import Any

from kvbelt.vllm.adapters import UNKNOWN, adapter_of, salt_of
from kvbelt.vllm.requests import PromptTokens


def has_media(request: Any) -> bool:
    """Whether the prompt has images, audio, video or embeddings. Its token ids do not tell which."""
    return bool(request.mm_features) or request.prompt_embeds is not None


def tokens_of(request: Any) -> PromptTokens | None:
    """The prompt, if its KV depends on tokens and a known adapter alone, and may be taken from a cache."""
    if has_media(request):
        return None
    adapter = adapter_of(request.lora_request)
    if adapter == UNKNOWN:
        return None
    if request.prompt_token_ids is None or request.skip_reading_prefix_cache:
        return None
    return PromptTokens(request.prompt_token_ids, salt_of(request.cache_salt or "", adapter))
