"""Loads: when requests arrive, and how long they are."""

from itertools import pairwise
from statistics import mean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbelt.simulate.load import BURSTINESS, Lengths, Load, trace_of


@given(seed=st.integers(0, 1000), kind=st.sampled_from(sorted(BURSTINESS)))
def test_the_same_seed_gives_the_same_requests(seed: int, kind: str) -> None:
    load = Load(3.0, 20.0, BURSTINESS[kind], (Lengths(spread=0.5),), seed)
    seen = [[(one.at, one.prompt, one.output) for one in load.requests()] for _ in range(2)]
    assert seen[0] == seen[1]
    assert seen[0][-1][0] == pytest.approx(20.0)


def test_gaps_vary_as_their_name_says() -> None:
    """The gaps' standard deviation over their mean is 1 over the root of the burstiness."""
    for burstiness in BURSTINESS.values():
        moments = [one.at for one in Load(10.0, 500.0, burstiness).requests()]
        gaps = [late - early for early, late in pairwise(moments)]
        assert pstdev(gaps) / mean(gaps) == pytest.approx(burstiness**-0.5, rel=0.15)


def test_lengths_lie_within_their_range_and_in_their_shares() -> None:
    mix = (Lengths(1000, 100, 0.5, share=3.0), Lengths(8000, 10, 0.0, share=1.0))
    requests = Load(10.0, 200.0, lengths=mix).requests()
    short = [one for one in requests if one.prompt <= 1500]
    assert all(one.prompt >= 500 and 50 <= one.output <= 150 for one in short)
    assert len(short) / len(requests) == pytest.approx(0.75, abs=0.05)


def test_a_conversations_prompt_grows_by_its_answers() -> None:
    load = Load(turns=3, growth=50)
    first, follow = load.requests()[0], load.following()
    second = follow(first, 10.0)
    third = follow(second, 20.0)
    assert (second.prompt, second.shared) == (7500 + 200 + 50, 7700)
    assert third.prompt == second.prompt + 250
    assert second.at > 10.0
    assert follow(third, 30.0) is None


def test_a_share_of_requests_begins_alike() -> None:
    requests = Load(10.0, 100.0, lengths=(Lengths(1000, 10, 0.5),), hot=0.3).requests()
    hot = [one for one in requests if one.conversation is not None]
    assert len(hot) / len(requests) == pytest.approx(0.3, abs=0.05)
    assert all(one.shared == min(one.prompt - 1, 900) for one in hot)
    assert len({one.conversation for one in hot}) == 1


def test_a_trace_is_read_line_by_line() -> None:
    lines = [
        b'{"arrival": 0, "prompt_tokens": 100, "output_tokens": 10, "conversation": "a"}',
        b"",
        b'{"arrival": 1.5, "prompt_tokens": 30, "output_tokens": 5}',
        b'{"arrival": 2, "prompt_tokens": 150, "output_tokens": 10, "conversation": "a"}',
    ]
    one, alone, two = trace_of(lines, "t.jsonl")
    assert (one.conversation, two.conversation, alone.conversation) == (0, 0, None)
    assert (one.shared, two.shared) == (0, 110)


@pytest.mark.parametrize(
    "line",
    [
        b'{"arrival": 0, "prompt_tokens": 0, "output_tokens": 1}',
        b'{"arrival": -1, "prompt_tokens": 5, "output_tokens": 1}',
        b'{"arrival": 0, "prompt": 5}',
        b"[]",
        b"nonsense",
    ],
)
def test_a_wrong_line_is_named(line: bytes) -> None:
    good = b'{"arrival": 0, "prompt_tokens": 5, "output_tokens": 1}'
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2"):
        trace_of([good, line], "t.jsonl")


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(ValueError, match="no requests"):
        trace_of([], "t.jsonl")
