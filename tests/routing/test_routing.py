"""The pure choices: which response mode, and whose first token."""

import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbelt.routing.decider import why_not_split
from kvbelt.routing.exactness import CARRIED, FAST, PREFILL_ONLY, SPENT_ON_PROMPT, Decision, ResponseMode, first_token
from kvbelt.routing.view import RequestView
from kvbelt.wire.health import Role


def choose(num_prompts=1, **fields):
    """The first-token rule for a request with these fields."""
    view = msgspec.json.decode(json.dumps(fields).encode(), type=RequestView)
    names = [name for name, value in fields.items() if value is not None]
    return first_token(view, names, num_prompts=num_prompts)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0, "seed": 7},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "logit_bias": {"5": 1}},
        {"n": 1, "best_of": 1, "echo": False, "stop": None, "logprobs": None, "seed": None, "max_tokens": 100},
        {"logprobs": False, "tools": [], "response_format": {"type": "text"}, "stop": []},
        {"tools": [{"type": "function"}], "tool_choice": "none"},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_tokens": 0},
        {"ignore_eos": True, "stop_token_ids": [4], "stream": True, "stream_options": {"include_usage": True}},
        {"prompt": "x", "model": "m", "user": "u", "return_token_ids": True},
    ],
)
def test_the_fast_path_is_taken_where_it_is_exact(fields):
    """Neutral values count as absent."""
    assert choose(**fields) == FAST


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"n": 2}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True}, "echo"),
        ({"logprobs": 0}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 0}, "logprobs"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"stop": "a"}, "stop"),
        ({"stop": ["a"]}, "stop"),
        ({"seed": 0}, "seed"),
        ({"seed": 1, "temperature": 0.5}, "seed"),
        ({"presence_penalty": 0.1}, "penalty"),
        ({"frequency_penalty": -0.1}, "penalty"),
        ({"repetition_penalty": 1.1}, "penalty"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "guided"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "continuous_usage"),
        ({"guided_json": {}}, "unknown_field"),
        ({"structured_outputs": {"choice": ["a"]}}, "unknown_field"),
        ({"logits_processors": ["x"]}, "unknown_field"),
        ({"bad_words": ["x"]}, "unknown_field"),
        ({"truncate_prompt_tokens": 5}, "unknown_field"),
        ({"use_beam_search": True}, "unknown_field"),
        ({"suffix": "x"}, "unknown_field"),
    ],
)
def test_everything_else_is_rederived_with_its_reason(fields, reason):
    """The decode worker derives token 1 itself."""
    assert choose(**fields) == Decision(ResponseMode.REDERIVE, reason)


def test_several_prompts_are_rederived():
    """Several prompts have several first tokens."""
    assert choose(num_prompts=2) == Decision(ResponseMode.REDERIVE, "many_prompts")


@pytest.mark.parametrize(
    "fields", [{"max_tokens": 1}, {"max_completion_tokens": 1, "max_tokens": 9}, {"max_tokens": 1, "n": 3}]
)
def test_one_token_is_the_prefill_workers_answer(fields):
    """One worker answers a request for one token, whatever its other fields."""
    assert choose(**fields) == PREFILL_ONLY


@settings(deadline=None)
@given(st.text(min_size=1).filter(lambda name: name not in RequestView.__struct_fields__))
def test_an_unknown_field_is_a_reason(name):
    """Only fields on the lists allow the fast path."""
    expected = FAST if name in CARRIED | SPENT_ON_PROMPT else Decision(ResponseMode.REDERIVE, "unknown_field")
    assert first_token(RequestView(), [name], num_prompts=1) == expected


@pytest.mark.parametrize(
    ("first", "tokens", "reason"),
    [
        (FAST, 10, None),
        (FAST, 9, "short_prompt"),
        (PREFILL_ONLY, 9, "short_prompt"),
        (PREFILL_ONLY, 10, None),
        (Decision(ResponseMode.REDERIVE, "seed"), 10, None),
        (Decision(ResponseMode.REDERIVE, "many_prompts"), 10, "many_prompts"),
    ],
)
def test_what_cannot_be_split(first, tokens, reason):
    assert why_not_split(first, tokens, 10) == reason


def test_a_worker_of_both_roles_serves_either():
    """A worker of both roles serves either; others serve only their own."""
    assert Role.BOTH.serves(Role.PREFILL)
    assert Role.BOTH.serves(Role.DECODE)
    assert not Role.DECODE.serves(Role.PREFILL)
