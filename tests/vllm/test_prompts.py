"""Which prompts have hashes by which other prompts may share their KV."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvbelt.vllm.prompts import has_media, tokens_of
from kvbelt.vllm.requests import PromptTokens


def request(**fields: Any) -> Any:
    """A request of vLLM's, of text alone unless said otherwise."""
    plain: dict[str, Any] = {
        "mm_features": [],
        "prompt_embeds": None,
        "lora_request": None,
        "prompt_token_ids": [1, 2, 3],
        "skip_reading_prefix_cache": False,
        "cache_salt": None,
    }
    return SimpleNamespace(**plain | fields)


def test_a_prompt_of_text_is_its_tokens() -> None:
    """And its salt."""
    assert tokens_of(request()) == PromptTokens([1, 2, 3])
    assert tokens_of(request(cache_salt="x")) == PromptTokens([1, 2, 3], "x")
    assert not has_media(request())


@pytest.mark.parametrize(
    "more", [{"mm_features": [object()]}, {"prompt_embeds": object()}], ids=["image", "embeddings"]
)
def test_media_share_nothing_and_are_told(more: dict[str, Any]) -> None:
    """Other images may have the same token ids."""
    assert has_media(request(**more))
    assert tokens_of(request(**more)) is None


def test_a_prompt_that_may_not_be_taken_from_a_cache_shares_nothing() -> None:
    """As one whose log probabilities were asked for."""
    assert tokens_of(request(skip_reading_prefix_cache=True)) is None
