"""What the benchmarks of placement on a CPU compare, and what they send."""

import argparse
import json
from pathlib import Path

import pytest
from benchmarks import conversations
from benchmarks._variants import Variant, parse_variant


def test_a_variant_is_a_topology_and_arguments_of_the_proxy() -> None:
    """In one string, as for a shell."""
    assert parse_variant("0p2d=0p2d") == Variant("0p2d", "0p2d")
    assert parse_variant("a b=1p1d --slo-ttft-ms '{ttft:.0f}'") == Variant(
        "a b", "1p1d", ("--slo-ttft-ms", "{ttft:.0f}")
    )


@pytest.mark.parametrize("text", ["", "1p1d", "name=", "name=two", "name=1p0d"])
def test_another_form_is_refused(text: str) -> None:
    """With an example."""
    with pytest.raises(argparse.ArgumentTypeError, match="example"):
        parse_variant(text)


ARGUMENTS = argparse.Namespace(prompt=60, answer=4, turns=3, gap=2.0, seconds=50.0)


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "model", lambda: Path("m"))


def test_a_turn_s_prompt_goes_on_from_the_one_before() -> None:
    """By as many tokens, and two seconds later."""
    asked = conversations.talks(ARGUMENTS, 1.0, seed=1)
    prompts = {(round(one.at - 2.0 * turn, 6), turn): json.loads(one.body)["prompt"] for turn, one in asked}
    assert len(prompts) >= 3 * 5
    for (began, turn), prompt in prompts.items():
        assert len(prompt) == 20 * (turn + 1)
        assert prompt[: 20 * turn] == (prompts[began, turn - 1] if turn else [])


def test_half_of_the_prompts_begin_alike() -> None:
    """And end differently; the others have nothing in common."""
    prompts = [json.loads(one.body)["prompt"] for one in conversations.shared(ARGUMENTS, 4.0, seed=1)]
    heads = [tuple(prompt[:54]) for prompt in prompts]
    most = max(map(heads.count, heads))
    assert 0.4 < most / len(prompts) < 0.6
    assert len(set(heads)) == len(prompts) - most + 1
    assert len({tuple(prompt[54:]) for prompt in prompts}) == len(prompts)
