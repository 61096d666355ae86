"""The pure choices: who, by which road, and whose first token."""

import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbelt.routing.decider import decide
from kvbelt.routing.endpoint import Endpoint, Health, Report, Role
from kvbelt.routing.exactness import CARRIED, FAST, PREFILL_ONLY, SPENT_ON_PROMPT, FirstToken, Road, first_token
from kvbelt.routing.policy import Policy, is_ready
from kvbelt.routing.view import RequestView
from kvbelt.wire.handoff import ReceiverAddress

RECEIVER = ReceiverAddress("e", "127.0.0.1", 7300, 7400)
READY = Report(Health.READY, receiver=RECEIVER)


def endpoint(name, report=READY, role=Role.DECODE):
    """One endpoint."""
    return Endpoint(name, role, report)


def choose(num_prompts=1, **fields):
    """The first-token rule for a request with these fields."""
    view = msgspec.json.decode(json.dumps(fields).encode(), type=RequestView)
    names = [name for name, value in fields.items() if value is not None]
    return first_token(view, names, num_prompts=num_prompts)


def test_round_robin_takes_turns():
    """Each ready endpoint in order."""
    policy = Policy()
    endpoints = [endpoint(name) for name in "abc"]
    assert [policy.pick(endpoints).name for _ in range(6)] == ["a", "b", "c", "a", "b", "c"]


@pytest.mark.parametrize("health", [Health.UNKNOWN, Health.UNREADY, Health.LOST])
def test_only_ready_endpoints_are_picked(health):
    """Not known, not ready and lost are all left out; with nobody left there is no pick."""
    policy = Policy()
    assert policy.pick([endpoint("a", Report(health)), endpoint("b")]).name == "b"
    assert policy.pick([endpoint("a", Report(health))]) is None


def test_those_already_tried_are_left_out():
    """A retry goes to somebody else, or to nobody."""
    policy = Policy()
    tried = {endpoint("a").life}
    assert policy.pick([endpoint("a"), endpoint("b")], exclude=tried).name == "b"
    assert policy.pick([endpoint("a")], exclude=tried) is None


def test_scorers_decide_before_turns_do():
    """The picker sees only the best."""
    policy = Policy(filters=[is_ready], scorers=[lambda e: float(e.name in "bc"), lambda e: 0.0])
    assert [policy.pick([endpoint(name) for name in "abc"]).name for _ in range(3)] == ["b", "c", "b"]


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
    """Neutral values are as good as absent ones."""
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
    assert choose(**fields) == FirstToken(Road.REDERIVE, reason)


def test_several_prompts_are_rederived():
    """They have several first tokens."""
    assert choose(num_prompts=2) == FirstToken(Road.REDERIVE, "many_prompts")


@pytest.mark.parametrize(
    "fields", [{"max_tokens": 1}, {"max_completion_tokens": 1, "max_tokens": 9}, {"max_tokens": 1, "n": 3}]
)
def test_one_token_is_the_prefill_workers_answer(fields):
    """Whatever else is asked, one worker answers the whole request."""
    assert choose(**fields) == PREFILL_ONLY


@settings(deadline=None)
@given(st.text(min_size=1).filter(lambda name: name not in RequestView.__struct_fields__))
def test_a_field_that_nobody_thought_about_is_a_reason(name):
    """Fast only for fields on the lists; the lists hold no field that merely looks harmless."""
    expected = FAST if name in CARRIED | SPENT_ON_PROMPT else FirstToken(Road.REDERIVE, "unknown_field")
    assert first_token(RequestView(), [name], num_prompts=1) == expected


@pytest.mark.parametrize(
    ("prefill", "decode", "first", "tokens", "road", "reason"),
    [
        (None, READY, FAST, 100, None, "no_prefill_worker"),
        (None, READY, PREFILL_ONLY, 100, None, "no_prefill_worker"),
        (READY, Report(Health.READY), FAST, 100, None, "decode_has_no_receiver"),
        (READY, READY, FAST, 9, None, "short_prompt"),
        (READY, READY, FAST, 10, Road.FAST, None),
        (READY, READY, FirstToken(Road.REDERIVE, "seed"), 10, Road.REDERIVE, "seed"),
        (READY, Report(Health.READY), PREFILL_ONLY, 10, Road.PREFILL_ONLY, None),
    ],
)
def test_the_decider(prefill, decode, first, tokens, road, reason):  # noqa: PLR0917 - one row of the table
    """Disaggregate unless a side cannot take part or the prompt is short."""
    decision = decide(
        first,
        None if prefill is None else endpoint("p", prefill, Role.PREFILL),
        endpoint("d", decode),
        prompt_tokens=tokens,
        min_prompt_tokens=10,
    )
    assert (decision.road, decision.reason) == (road, reason)


def test_a_worker_of_both_roles_serves_either():
    """And one of a single role only its own."""
    assert Role.BOTH.serves(Role.PREFILL)
    assert Role.BOTH.serves(Role.DECODE)
    assert not Role.DECODE.serves(Role.PREFILL)
