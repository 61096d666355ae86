"""Reports of what steps cost."""

import msgspec
import pytest

from kvbelt.wire.steps import StepsNow
from tests.wire.messages import STEPS


@pytest.mark.parametrize(
    ("name", "value"),
    [("decodes", -1), ("kv_tokens", -1), ("prompt_tokens", -1), ("most_prompt_tokens", 0), ("most_requests", 0)],
)
def test_a_number_that_cannot_be_planned_with_is_refused(name: str, value: int) -> None:
    """With its name, and what it may be."""
    said = msgspec.to_builtins(STEPS) | {name: value}
    with pytest.raises(msgspec.ValidationError, match=rf"`int` >= [01] - at `\$\.{name}`"):
        msgspec.convert(said, StepsNow)


@pytest.mark.parametrize("name", ["base", "token", "kv_token", "sigma"])
@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
def test_a_cost_is_a_number_and_not_negative(name: str, value: float) -> None:
    """Over msgpack they could be anything."""
    costs = msgspec.to_builtins(STEPS.costs) | {name: value}
    packed = msgspec.msgpack.encode(msgspec.to_builtins(STEPS) | {"costs": costs})
    with pytest.raises(msgspec.ValidationError, match=rf"costs are .*{name}={value}"):
        msgspec.msgpack.decode(packed, type=StepsNow)
