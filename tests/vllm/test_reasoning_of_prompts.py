"""What a prefill server says of a chat's reasoning, without vLLM."""

from types import SimpleNamespace

import pytest

from kvbelt.vllm.reasoning import ReasoningOfPrompts, keeps_special_tokens


def config(parser: str) -> SimpleNamespace:
    """What is read of a ``VllmConfig``."""
    return SimpleNamespace(structured_outputs_config=SimpleNamespace(reasoning_parser=parser), model_config=None)


def test_a_server_without_a_parser_has_no_reasoning() -> None:
    assert ReasoningOfPrompts(config("")).of([1, 2]) == "none"
    assert ReasoningOfPrompts(SimpleNamespace()).of([1, 2]) == "none"


@pytest.mark.parametrize("prompt", [[1, 2], None])
def test_without_a_parser_s_word_reasoning_may_come(prompt: list[int] | None) -> None:
    """This parser cannot be made, and of embeddings there is nothing to ask it."""
    assert ReasoningOfPrompts(config("no-such-parser")).of(prompt) == "open"


def test_special_tokens_are_kept_where_vllm_is_told_so() -> None:
    assert keeps_special_tokens(SimpleNamespace(skip_special_tokens=False))
    assert not keeps_special_tokens(SimpleNamespace(skip_special_tokens=True))
    assert not keeps_special_tokens(None)
