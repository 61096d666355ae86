"""Splitting is switched off where the account says so twice, and on again where it says so twice."""

import pytest

from kvbelt.routing.levels import kept
from kvbelt.routing.regret import MARGIN, SplitSwitch


@pytest.mark.parametrize(
    ("windows", "off"),
    [
        ([0.5], False),
        ([0.5, 0.5], True),
        ([0.5, 0.0, 0.5], False),
        ([MARGIN, MARGIN, MARGIN], False),
        ([0.5, 0.5, -0.1], True),
        ([0.5, 0.5, 0.0, -0.1], False),
        ([0.5, 0.5, 0.0, MARGIN, 0.0], True),
        ([0.5, 0.5, 0.0, 0.0, 0.5], False),
    ],
)
def test_two_windows_in_succession_switch(windows: list[float], off: bool) -> None:
    switch = SplitSwitch()
    for regret in windows:
        switch.judge(regret)
    assert switch.off is off


def test_it_tells_when_it_switches() -> None:
    switch = SplitSwitch()
    assert [switch.judge(regret) for regret in (0.5, 0.5, 0.5, 0.0, 0.0, 0.0)] == [
        False, True, False, False, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ttft", "mean", "pause", "within"),
    [
        (0.5, 0.02, 0.0, True),
        (0.51, 0.02, 0.0, False),
        (0.1, 0.03, 0.0, False),
        (0.1, None, 0.0, True),
        (0.1, 0.02, 0.6, False),
    ],
)
def test_a_pause_as_long_as_a_first_token_may_take_breaks_the_levels(
    ttft: float,
    mean: float | None,
    pause: float,
    within: bool,
) -> None:
    assert kept(0.5, 0.025, ttft, mean, pause) is within


def test_without_a_level_between_tokens_its_mean_does_not_matter() -> None:
    assert kept(0.5, None, 0.1, 9.0, 0.0)
