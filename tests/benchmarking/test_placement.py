"""The benchmark of placement: its systems."""

import pytest
from benchmarks.gpu.placement import System, parse_system


def test_systems_are_read() -> None:
    """Plain servers have a router and a step limit; kvbelt's proxy gets any arguments."""
    assert parse_system("plain-least@1024") == System(
        "plain-least@1024", "plain", least=True, tokens=1024, proxied=False
    )
    assert parse_system("B=--slo-itl-ms 50") == System("B", "kvbelt", arguments=("--slo-itl-ms", "50"))
    assert parse_system("fixed=") == System("fixed", "kvbelt")
    assert parse_system("direct") == System("direct", "kvbelt", proxied=False)


@pytest.mark.parametrize("text", ["plane", "plain@x", "a/b=--port 1"])
def test_what_is_no_system_is_refused(text) -> None:
    """The error has the text and examples; a name must do as a file name."""
    with pytest.raises(ValueError, match=f"'{text}' is no system; examples: "):
        parse_system(text)
