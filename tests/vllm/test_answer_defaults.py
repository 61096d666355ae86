"""What the connector says of the server's generation config is what vLLM's OpenAI server takes from there."""

from types import SimpleNamespace

import pytest

from kvbelt.vllm.answer_defaults import answer_defaults
from kvbelt.wire.health import AnswerDefaults


@pytest.mark.parametrize(
    ("source", "in_file", "override", "expected"),
    [
        ("auto", {}, {}, AnswerDefaults()),
        ("auto", {"max_tokens": 50, "temperature": 0.6}, {}, AnswerDefaults(unless_asked=50)),
        ("auto", {}, {"max_new_tokens": 50}, AnswerDefaults(unless_asked=50, most=50)),
        ("vllm", {}, {"max_new_tokens": 50}, AnswerDefaults(unless_asked=50, most=50)),
        ("/a/folder", {"max_tokens": 50}, {}, AnswerDefaults(unless_asked=50, most=50)),
        ("auto", {"presence_penalty": 0.5}, {}, AnswerDefaults(penalties=True)),
        ("auto", {"frequency_penalty": 0.0, "repetition_penalty": 1.1}, {}, AnswerDefaults()),
    ],
)
def test_defaults(source: str, in_file: dict, override: dict, expected: AnswerDefaults) -> None:
    """A penalty for repetition counts the prompt too, so that it is the same wherever the answer begins."""
    merged = in_file | ({"max_tokens": override["max_new_tokens"]} if override else {})
    model = SimpleNamespace(
        generation_config=source, override_generation_config=override, get_diff_sampling_param=lambda: merged
    )
    assert answer_defaults(model) == expected
